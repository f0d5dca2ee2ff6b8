"""The command in this process, for what is about its words and not about the process."""

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
