"""Models with the attention of real ones: none aborts, every one works, and docs/support.md says so."""

from __future__ import annotations

import pytest

from benchmarks.zoo.check import check_shape
from benchmarks.zoo.page import PAGE, row
from benchmarks.zoo.shapes import SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace(" ", "-"))
def test_shape(shape, tmp_path):
    check = check_shape(shape, tmp_path)
    assert not check.failed
    assert len(check.created) == len(check.ran) == 7
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    assert row(check) in lines, "run .venv/bin/python -m benchmarks.zoo"
