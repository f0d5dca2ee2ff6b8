"""What a command that refuses says."""

from __future__ import annotations

from conftest import Outcome


def refused(outcome: Outcome) -> str:
    """The one line, without the name of the command."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("depthkv-edge: ")
    return lines[0].removeprefix("depthkv-edge: ")
