"""Standard streams that are closed, full, not read, or in another encoding: an answer, or one line and exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from conftest import Outcome

COMMAND = [sys.executable, "-m", "depthkv_edge"]
RUN = ["run", "smollm2", "-c", "256", "-n", "4", "-p"]
CHAT = ["chat", "smollm2", "-c", "256", "-n", "4", "--temp", "0"]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the redirections are a shell's")
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is full")


def redirected(*arguments: str, to: str, stdin: bytes = b"", **environment: str) -> Outcome:
    """Run the command with redirections, as the shell writes them."""
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join([*COMMAND, *arguments])} {to}"],
        input=stdin,
        capture_output=True,
        env=os.environ | environment,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode())


def line(outcome: Outcome) -> str:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("depthkv-edge: ") and outcome.err.count("\n") == 1, outcome.err
    return outcome.err


@pytest.mark.parametrize("arguments", [["run", "smollm2", "-f", "-"], CHAT])
def test_closed_input(arguments):
    assert "standard input cannot be read (it is closed)" in line(redirected(*arguments, to="<&-"))


@pytest.mark.parametrize(
    ("to", "arguments"),
    [
        pytest.param(">/dev/full", [*RUN, "Hello"], marks=FULL),
        pytest.param(">/dev/full", [*CHAT, "--json"], marks=FULL),
        pytest.param(">/dev/full", ["doctor", "smollm2"], marks=FULL),
        pytest.param(">/dev/full", ["run", "--help"], marks=FULL),
        (">&-", [*RUN, "Hello", "--json"]),
        (">&-", ["inspect", "smollm2"]),
        (">&-", ["--version"]),
    ],
)
def test_output_that_cannot_be_written(to, arguments):
    outcome = redirected(*arguments, to=to, stdin=b"Hello\n")
    assert "standard output cannot be written (" in line(outcome) and outcome.out == ""


@FULL
def test_messages_that_cannot_be_written():
    """The answer does not depend on them, and no file gets the number of the closed stream."""
    expected = redirected(*RUN, "Hello", to="2>/dev/null")
    assert expected.code == 0 and expected.out.strip()
    for to in ("2>&-", "2>/dev/full"):
        assert redirected(*RUN, "Hello", to=to) == expected
        assert redirected("run", "no-such-file", "-p", "x", to=to).code == 2


def test_a_closed_stream_damages_no_file(smollm2, tmp_path):
    """`inspect --plot` opens a file for writing: with all three closed it must not become one of them."""
    plot = tmp_path / "plot.png"
    assert redirected("inspect", "smollm2", "--plot", str(plot), to="<&- >/dev/null 2>&-").code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_program_that_follows_has_all_three(tmp_path):
    """As `serve` becomes the server: what it opens must not get the number of a stream."""
    found = tmp_path / "found"
    check = f"import os; open({str(found)!r}, 'w').write(repr([os.fstat(fd).st_rdev for fd in range(3)]))"
    code = (
        "import os, sys\n"
        "from depthkv_edge.cli.streams import prepare_streams\n"
        "prepare_streams()\n"
        f"os.execv(sys.executable, [sys.executable, '-S', '-c', {check!r}])\n"
    )
    command = shlex.join([sys.executable, "-c", code])
    subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], timeout=300)
    assert found.read_text() == repr([os.stat(os.devnull).st_rdev] * 3)


@pytest.mark.parametrize(
    "arguments",
    [[*RUN, "Count to a hundred"], [*CHAT, "--json"], ["doctor", "smollm2"], ["--help"]],
    ids=" ".join,
)
def test_a_reader_that_has_gone(arguments):
    """As `| head` leaves: no word, and not exit code 0."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], input=b"Hello\n", stdout=writer, stderr=subprocess.PIPE, timeout=300, close_fds=True
    )
    os.close(writer)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_another_encoding():
    """What the model says is not always to be had in it. JSON is JSON in each."""
    arguments = [*RUN[:-2], "12", "-p", "Repeat: “naïve” – 日本 😀"]
    expected = redirected(*arguments, "--json", to="")
    assert expected.code == 0, expected.err
    other = redirected(*arguments, "--json", to="", PYTHONIOENCODING="cp1252")
    assert other.out.isascii()
    assert json.loads(other.out)["text"] == json.loads(expected.out.encode("latin-1"))["text"]
    assert redirected(*arguments, to="", PYTHONIOENCODING="ascii").code == 0


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_an_encoding_lacks_are_question_marks(encoding):
    code = (
        "import click, sys\n"
        "from depthkv_edge.cli.streams import echo_json, prepare_streams\n"
        "prepare_streams()\n"
        "echo_json({'text': '日本 😀'})\n"
        "sys.stdout.write('ä 日本\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    written, text = done.stdout.splitlines()
    assert json.loads(written) == {"text": "日本 😀"}
    assert text == ("ä" if encoding == "latin-1" else "?").encode("latin-1") + b" ??"


def test_lines_of_windows():
    """A mark in front, two characters at the end of a line: `/stats` and `/quit` are commands all the same."""
    outcome = redirected(*CHAT, to="", stdin=b"\xef\xbb\xbf/stats\r\nHello\r\n\r\n/quit\r\n")
    assert outcome.code == 0, outcome.err
    assert "0 so far" in outcome.err and outcome.out.strip()
    assert outcome.out == redirected(*CHAT, to="", stdin=b"Hello\n").out
