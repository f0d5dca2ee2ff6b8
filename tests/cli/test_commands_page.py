"""The page of all commands says what their help says, for which no library is needed."""

from __future__ import annotations

from pathlib import Path

from conftest import run_python

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_help_says():
    outcome = run_python(str(ROOT / "scripts" / "commands-page.py"), DEPTHKV_LIB_PATH="/nonexistent")
    assert (ROOT / "docs" / "commands.md").read_text() == outcome.out, outcome.err
