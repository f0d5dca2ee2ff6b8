"""The chat command: through pipes, on a terminal, and what a user can get wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import Outcome
from hypothesis import given
from hypothesis import strategies as st
from support.outcome import refused, run_here

from depthkv_edge import DepthKVError
from depthkv_edge.cli.chat_terminal import chat, interruptible, read_message

SMALL = ("-c", 512, "--temp", 0, "-n", 12, "--threads", 2)


@pytest.fixture
def run(capfd, smollm2) -> Callable[..., Outcome]:
    """Chat with SmolLM2, line by line."""
    return partial(run_here, capfd, "chat", "smollm2")


def lines(outcome) -> list[dict]:
    assert outcome.code == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def typed(*written: str) -> Callable[[str], str]:
    left = list(written)

    def ask(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return ask


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["hello"], "hello"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "one", "", "two \\", '"""'], "one\n\ntwo \\"),
        (['"""one"""'], "one"),
        (['"""', "one"], "one"),
        ([""], ""),
    ],
)
def test_messages_of_several_lines(written, message):
    assert read_message(typed(*written)) == message


def test_the_input_ends():
    with pytest.raises(EOFError):
        read_message(typed())


@given(st.lists(st.text(st.characters(exclude_characters='\n\r"\\'), max_size=8), min_size=1, max_size=5))
def test_a_block_is_what_was_written(written):
    assert read_message(typed('"""', *written, '"""')) == "\n".join(written).strip("\n")
    assert read_message(typed(*(line + "\\" for line in written[:-1]), written[-1])) == "\n".join(written)


def test_ctrl_c_is_a_flag():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_one_json_object_for_each_message(run):
    asked = "Name a colour.\n\nName a city.\n"
    outcome = run(*SMALL, "--kv-budget", 0.5, "--json", stdin=asked)
    first, second = lines(outcome)
    assert outcome.err == ""
    names = ["text", "finish", "tokens_new", "tokens_evaluated", "tokens_generated", "tokens_dropped", "kv"]
    assert list(first) == list(second) == names
    assert list(first["kv"]) == ["budget", "bytes", "bytes_full", "layers"]
    assert [layer["layer"] for layer in second["kv"]["layers"]] == list(range(30))
    for turn in (first, second):
        assert turn["text"].strip() and turn["finish"] in ("stop", "length")
        assert turn["tokens_evaluated"] == turn["tokens_new"] and turn["tokens_generated"] <= 12
    assert second["tokens_new"] < first["tokens_new"], "the template's own system prompt comes once"
    assert first["kv"]["bytes"] == first["kv"]["bytes_full"] / 2

    outcome = run(*SMALL, "--kv-budget", 0.5, stdin=asked)
    assert outcome.code == 0, outcome.err
    assert outcome.out == first["text"] + "\n" + second["text"] + "\n", "the same as text"
    assert set(outcome.err.splitlines()) <= {"(the answer ends here: --predict allows no more)"}


def test_a_seed_repeats(run):
    arguments = ("-c", 256, "-n", 10, "--temp", 1.5, "--json", "--threads", 2, "--seed")
    first, again, other = (lines(run(*arguments, seed, stdin="Tell me a story.\n")) for seed in (0, 0, 8))
    assert first == again != other


def test_commands(run, tmp_path):
    path = tmp_path / "chat.json"
    asked = (
        f"Name a colour.\n/stats\n/save {path}\n/clear\n/load {path}\n/system Be terse.\n/system\n/help\n/quit\nNo.\n"
    )
    outcome = run(*SMALL, "--kv-budget", 0.5, "--system", "Be kind.", "--json", stdin=asked)
    (turn,) = lines(outcome)
    saved = json.loads(path.read_text())
    assert saved["system"] == "Be kind."
    assert saved["messages"] == [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": turn["text"]},
    ]
    said = outcome.err
    assert re.search(r"tokens +\d+ so far, \d+ in the context, \d+ at the front pinned", said)
    assert re.search(r"held +100%, 100%, 100%, 100% of the four quarters", said)
    columns = r"^ +29 +256 +\d+ +0 +[1-9]\d* +\d+ +100% +100% +100% +100%"
    assert re.search(columns, said, re.MULTILINE), "a row for each layer, with what is pinned and chosen"
    assert "2 messages saved" in said and "forgotten" in said
    assert said.count("2 messages read") == 2, "/load, and /system with a conversation to read again"
    assert "\nBe terse.\n" in said
    assert all(f"/{name}" in said for name in ("stats", "save", "load", "system", "clear", "help", "quit"))


def test_told_once_that_turns_are_forgotten(run):
    asked = "".join(f"Question {i}: what are rivers and bridges good for, in one sentence?\n" for i in range(14))
    outcome = run(*SMALL, "-c", 256, "--kv-budget", 0.6, "--json", stdin=asked)
    turns = lines(outcome)
    assert sum(turn["tokens_dropped"] > 0 for turn in turns) >= 2
    assert outcome.err.count("oldest turns are forgotten") == 1


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("/nonsense\n", "/nonsense is not a command: /help"),
        ("/save\n", "/save needs the name of a file"),
        ("/load none.json\n", "none.json cannot be read"),
    ],
)
def test_a_wrong_line_ends_a_script(run, asked, part):
    assert part in refused(run(*SMALL, "--json", stdin=asked))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text(monkeypatch, errors):
    """Python decodes it one way or the other, depending on the locale."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    with pytest.raises(DepthKVError, match="^standard input is not UTF-8 text: convert it first$"):
        chat(SimpleNamespace(forgotten=False))


def test_a_line_that_is_no_text_does_not_end_a_chat(monkeypatch, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/help\n"), "utf-8", "surrogateescape")
    monkeypatch.setattr(stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)
    chat(SimpleNamespace(forgotten=False))
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "depthkv-edge: standard input is not UTF-8 text: convert it first"
    assert any(line.startswith("/quit") for line in rest)


# on a terminal


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments: str):
        import pty

        try:
            self.fd, slave = pty.openpty()
        except OSError as error:  # a machine may have no /dev/pts
            pytest.skip(f"no terminal to be had here: {error}")
        command = [sys.executable, "-m", "depthkv_edge", *arguments]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(slave)
        os.set_blocking(self.fd, False)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, part: str, seconds: float = 60) -> str:
        """What is shown up to and with `part`; it is not shown again."""
        until = time.monotonic() + seconds
        while part not in self.shown:
            assert time.monotonic() < until, f"{part!r} was not shown: {self.shown!r}"
            try:
                self.shown += os.read(self.fd, 65536).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the other end has gone
                assert part in self.shown, f"{part!r} was not shown: {self.shown!r}"
        before, found, self.shown = self.shown.partition(part)
        return before + found

    def ended(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in what it starts in the background


@pytest.fixture
def terminal(smollm2) -> Iterator[Callable[..., Terminal]]:
    pytest.importorskip("pty")
    opened: list[Terminal] = []

    def make(*arguments: object) -> Terminal:
        opened.append(Terminal("chat", "smollm2", *map(str, arguments)))
        return opened[-1]

    yield make
    for each in opened:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        os.close(each.fd)


STORY = "Write a long story about a river, its bridges, and all the people there."


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, run, tmp_path):
    arguments = ("-c", 1024, "--temp", 0, "--threads", 2, "--kv-budget", 0.5)
    (whole,) = lines(run(*arguments, "-n", 100, "--json", stdin=f"{STORY}\n"))
    assert whole["finish"] == "length", "left alone, it is a long answer"
    shell = terminal(*arguments, "-n", 600)
    assert "50% of the full one; /help" in shell.wait_for("commands")
    shell.wait_for("> ")
    shell.send(f"{STORY}\n")
    shell.wait_for("there.\r\n")
    shell.wait_for(" ")  # the first words of the answer
    shell.send("\x03")
    shell.wait_for("\n> ", seconds=10)
    shell.send(f"/save {tmp_path / 'chat.json'}\n")
    shell.wait_for("2 messages saved")
    stopped = json.loads((tmp_path / "chat.json").read_text())["messages"][-1]["content"]
    assert stopped and whole["text"].startswith(stopped) and len(stopped) < len(whole["text"])
    shell.wait_for("> ")
    shell.send("Name a colour.\\\n")
    shell.wait_for(". ")
    shell.send("One word.\n")
    shell.wait_for("word.\r\n")
    shell.wait_for("> ")
    shell.send("/nonsense\n")
    shell.wait_for("is not a command")
    shell.wait_for("> ")
    shell.send("/stats\n")
    shell.wait_for("at the front pinned")
    shell.wait_for("> ")
    shell.send("\x04")
    assert shell.ended() == 0


def test_errors_are_shown_and_the_chat_goes_on(terminal, tmp_path):
    long, unpinned, kept = (tmp_path / f"{name}.json" for name in ("long", "unpinned", "kept"))
    answer = {"role": "assistant", "content": "No."}
    long.write_text(json.dumps({"messages": [{"role": "user", "content": "word " * 1200}, answer]}))
    unpinned.write_text(
        json.dumps({"system": "word " * 300, "messages": [{"role": "user", "content": "Yes?"}, answer]})
    )
    shell = terminal("-c", 1024, "--kv-budget", 0.25, "--temp", 0, "-n", 4, "--threads", 2)
    for sent, shown in (
        ("Name a colour.\n", "colour.\r\n"),
        ("/save ~nosuchuser/chat.json\n", "cannot be written"),
        (f"/load {long}\n", "longer than the context"),
        ("/stats\n", "100%, 100%, 100%, 100% of the four quarters"),
        (f"/load {unpinned}\n", "cannot be pinned"),
        ("", "has forgotten the conversation: /save FILE and /load FILE bring it back"),
        (f"/save {kept}\n", "2 messages saved"),
        (f"/load {kept}\n", "2 messages read"),
    ):
        if sent:
            shell.wait_for("> ")
        shell.send(sent)
        shell.wait_for(shown)
    assert json.loads(kept.read_text())["messages"][0]["content"] == "Name a colour."
    shell.send("/quit\n")
    assert shell.ended() == 0


def test_ctrl_c_twice_at_an_empty_prompt_ends(terminal):
    shell = terminal("-c", 256, "--threads", 2)
    shell.wait_for("> ")
    shell.send("\x03")
    shell.wait_for("once more")
    shell.wait_for("> ")
    shell.send("\x03")
    assert shell.ended() == 0
