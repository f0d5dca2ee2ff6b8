"""The command in this process, and what one that refuses says."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from conftest import Outcome

from depthkv_edge.cli.main import main


def run_here(capfd: pytest.CaptureFixture[str], *arguments: Any, stdin: str = "") -> Outcome:
    """Run `depthkv-edge`. What the engine writes past Python is captured too."""
    capfd.readouterr()
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["depthkv-edge", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        try:
            main()
        except SystemExit as end:
            code = end.code
    written = capfd.readouterr()
    return Outcome(code or 0, written.out, written.err)


def refused(outcome: Outcome) -> str:
    """The one line, without the name of the command."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("depthkv-edge: ")
    return lines[0].removeprefix("depthkv-edge: ")
