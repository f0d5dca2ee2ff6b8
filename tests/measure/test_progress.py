"""Progress where standard error is no terminal: a line a minute, and what stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from depthkv_edge.measure import progress
from depthkv_edge.measure.progress import LongWork, duration


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)


def wait_for(capsys: pytest.CaptureFixture[str], pattern: str) -> str:
    """Standard error, once it holds what is looked for."""
    text = ""
    for _ in range(200):
        text += capsys.readouterr().err
        if re.search(pattern, text):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{pattern!r} is not in {text!r}")


def test_lines_say_what_is_done_and_what_is_left(fast, capsys):
    with LongWork("reading") as work:
        work.begin(400)
        assert re.search("^reading: 0 s$", wait_for(capsys, "reading"), re.M)
        work.title("writing")
        work.advance(100)
        wait_for(capsys, r"(?m)^writing: 0 s, 25% done, \d+ s left$")
        work.say("one is done")
        wait_for(capsys, "(?m)^one is done$")
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().err == "", "it is over"


def test_short_work_says_nothing(capsys):
    with progress.progress("reading", 3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5_900, "98 min"), (6_000, "1.7 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo terminal")
@pytest.mark.parametrize(("term", "bar"), [("xterm", True), ("dumb", False)])
def test_terminal(term, bar):
    """A bar where there can be one. Names are shown as they are, whatever they would mean to rich."""
    pty = pytest.importorskip("pty")
    code = (
        "import time\n"
        "from depthkv_edge.measure import progress\n"
        "progress.LINE_SECONDS = 0.2\n"
        "with progress.LongWork('[one].txt') as work:\n"
        "    work.begin(4)\n"
        "    work.advance(1)\n"
        "    work.say('[two].txt :fire: is done')\n"
        "    time.sleep(0.5)\n"
    )
    try:
        terminal, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"no pseudo terminal is to be had: {error}")
    environment = os.environ | {"TERM": term, "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    text = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert done.returncode == 0 and done.stdout == b""
    assert "[one].txt" in text and "[two].txt :fire: is done" in text
    assert ("━" in text) == bar and bool(re.search(r"25% done, \d+ s left", text)) != bar
