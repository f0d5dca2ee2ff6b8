"""Models with the attention of real ones: none aborts, every one works, and docs/support.md says so."""

from __future__ import annotations

import pytest

from benchmarks.zoo.check import check_shape, refused
from benchmarks.zoo.page import PAGE, TOP, refusals, row
from benchmarks.zoo.shapes import SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name.replace(" ", "-"))
def test_shape(shape, tmp_path):
    check = check_shape(shape, tmp_path)
    assert not check.failed
    assert len(check.created) == len(check.ran) == 7
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    assert row(check) in lines, "run .venv/bin/python -m benchmarks.zoo"


def test_the_rest_of_the_page(tmp_path):
    page = PAGE.read_text()
    assert page.startswith(TOP) and page.endswith(refusals(refused(tmp_path))), "run .venv/bin/python -m benchmarks.zoo"
