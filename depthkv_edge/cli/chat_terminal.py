"""A conversation on a terminal, or line by line through pipes: reading messages, commands, what is shown."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from depthkv_edge.chat.conversation import Conversation
from depthkv_edge.chat.saved import read_saved, save
from depthkv_edge.chat.turn import Holding, Turn
from depthkv_edge.cli.run_table import prefill_progress
from depthkv_edge.cli.streams import StreamError, echo_json, reading
from depthkv_edge.errors import DepthKVError, Stopped
from depthkv_edge.units import kv_share

try:
    import readline  # line editing and history for input()
except ImportError:  # Windows
    readline = None  # type: ignore[assignment]

_BLOCK = '"""'
_ROLLED = (
    "(the conversation is longer than its context: from here on its oldest turns are forgotten, and the system prompt "
    "stays; this is said once)"
)
_FORGOTTEN = "(the model has forgotten the conversation: /save FILE and /load FILE bring it back)"
_AGES = ("oldest", "2nd quarter", "3rd quarter", "newest")

COMMANDS = {
    "stats": ("/stats", "what the KV cache holds, by layer and by age"),
    "save": ("/save FILE", "write the conversation to a file"),
    "load": ("/load FILE", "go on with a conversation that /save wrote"),
    "system": ("/system TEXT", 'change the system prompt (/system "" for none), and read the conversation again'),
    "clear": ("/clear", "forget the conversation, keep the system prompt"),
    "help": ("/help", "this list"),
    "quit": ("/quit", "end, as Ctrl-D does"),
}

Ask = Callable[[str], str]


def chat(conversation: Conversation, *, as_json: bool = False) -> None:
    """Answer messages until the input ends.

    On a terminal an error is shown and the chat goes on; otherwise it ends the chat.

    Args:
        as_json: one JSON object on standard output for each message, instead of the text.

    Raises:
        DepthKVError: a message or a command failed, and standard input is no terminal.
        KeyboardInterrupt: an answer was interrupted, and standard input is no terminal.
    """
    interactive = sys.stdin.isatty()
    ask = _ask_terminal if interactive and sys.stdout.isatty() else _ask_pipe
    tired = False  # Ctrl-C has been pressed at an empty prompt
    while True:
        try:
            message = read_message(ask)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not interactive:
                raise
            if tired and not _typed():
                break
            tired = not _typed()
            tell("\nonce more ends the chat, as /quit does" if tired else "")
            continue
        except DepthKVError as error:
            if not interactive or isinstance(error, StreamError):
                raise
            tell(f"depthkv-edge: {error}")
            continue
        tired, forgotten = False, conversation.forgotten
        try:
            if not handle(conversation, message, as_json=as_json, interactive=interactive):
                return
        except DepthKVError as error:
            if not interactive or isinstance(error, StreamError):
                raise
            tell(f"depthkv-edge: {error}")
            if conversation.forgotten and not forgotten:
                tell(_FORGOTTEN)
    if interactive:
        tell("")


def handle(conversation: Conversation, message: str, *, as_json: bool = False, interactive: bool = True) -> bool:
    """Run a command, or answer a message; False if it was /quit.

    Raises:
        DepthKVError: it failed.
        KeyboardInterrupt: the answer was interrupted, and is not `interactive`.
    """
    if not message.strip():
        return True
    if message.startswith("/"):
        return _command(conversation, message)
    rolls = conversation.rolls
    with interruptible() as stop:
        try:
            turn = conversation.say(message, on_text=_ignore if as_json else _put, stop=stop)
        except Stopped:
            turn = None
    if turn is not None:
        _show(turn, as_json)
    if rolls == 0 and conversation.rolls > 0:
        tell(_ROLLED)
        if turn is not None and turn.tokens_evaluated > turn.tokens_new:
            tell("(the positions of this model cannot be shifted: what stays is computed again each time)")
    if not interactive and (turn is None or turn.finish == "interrupt"):
        raise KeyboardInterrupt
    return True


def read_message(ask: Ask) -> str:
    """One message: a line; lines that end in a backslash and the one after; or a block between lines of three quotes.

    Args:
        ask: reads a line, and shows what it is given before that.

    Raises:
        EOFError: the input has ended.
        DepthKVError: a line is not UTF-8 text.
    """
    line = ask("> ")
    if line.lstrip().startswith(_BLOCK):
        return _read_block(ask, line.lstrip()[len(_BLOCK) :])
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(ask(". "))
    return "\n".join(lines)


def _read_block(ask: Ask, line: str) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_BLOCK):
        try:
            lines.append(ask(". "))
        except EOFError:
            break
    else:
        lines[-1] = lines[-1].rstrip()[: -len(_BLOCK)]
    return "\n".join(lines).strip("\n")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C has been pressed. It raises nothing: an exception may be lost in llama.cpp's log callback."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield stopping.is_set
        return
    previous = signal.signal(signal.SIGINT, lambda signum, frame: stopping.set())
    try:
        yield stopping.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def tell(text: str) -> None:
    """A line for the user, on standard error: standard output is for the answers."""
    click.echo(text, err=True)


def _command(conversation: Conversation, line: str) -> bool:
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name not in COMMANDS:
        raise DepthKVError(
            f"/{name} is not a command: /help lists them; a message that begins with a slash needs a blank before it"
        )
    if name in ("save", "load") and not rest:
        raise DepthKVError(f"/{name} needs the name of a file")
    if name == "quit":
        return False
    if name == "stats":
        print_holding(conversation.holding())
    elif name == "save":
        save(conversation, Path(rest))
        tell(f"{len(conversation.messages)} messages saved to {rest}")
    elif name == "load":
        system, messages = read_saved(Path(rest))
        _replay(conversation, system, messages)
    elif name == "system":
        _system(conversation, rest)
    elif name == "clear":
        conversation.clear()
        tell("forgotten")
    else:
        for usage, text in COMMANDS.values():
            tell(f"{usage:14}{text}")
        tell(f"{'':14}a line that ends in \\ goes on; {_BLOCK} begins and ends several lines; Ctrl-C stops an answer")
    return True


def _system(conversation: Conversation, text: str) -> None:
    if not text:
        tell(conversation.system or "no system prompt")
        return
    text = "" if text == '""' else text
    if conversation.messages:
        _replay(conversation, text, list(conversation.messages))
    else:
        conversation.clear()
        conversation.system = text
        tell("system prompt set" if text else "no system prompt")


def _replay(conversation: Conversation, system: str, messages: list[dict[str, str]]) -> None:
    n_tokens = conversation.replay_length(system, messages)
    with interruptible() as stop, prefill_progress(n_tokens) as on_prefill:
        try:
            conversation.replay(system, messages, on_prefill=on_prefill, stop=stop)
        except Stopped:
            raise DepthKVError(f"stopped before the {n_tokens} tokens of the conversation were read") from None
    tell(f"{len(messages)} messages read, {n_tokens} tokens")
    if conversation.rolls > 0:
        tell(_ROLLED)


def _show(turn: Turn, as_json: bool) -> None:
    if as_json:
        echo_json(turn.to_dict())
        return
    click.echo()
    if turn.finish == "context":
        tell("(the answer ends here: the context is full of this turn alone)")
    elif turn.finish == "length":
        tell("(the answer ends here: --predict allows no more)")


def print_holding(holding: Holding) -> None:
    """What the KV cache holds: facts, and a table of layers."""
    console = Console(stderr=True, highlight=False)
    for name, text in holding_rows(holding):
        console.print(f"[bold]{name:<10}[/]{text}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "cells", "held", "evicted", "pinned", "chosen", *_AGES):
        table.add_column(name, justify="right", no_wrap=True)
    for layer, ages in zip(holding.kv.layers, holding.ages, strict=True):
        shares = ("-" if math.isnan(share) else f"{share:.0%}" for share in ages)
        counts = (layer.layer, layer.cells, layer.used, layer.evicted, layer.pinned, layer.chosen)
        table.add_row(*map(str, counts), *shares)
    console.print(table)


def holding_rows(holding: Holding) -> list[tuple[str, str]]:
    """Rows above the table of layers: a name, and what is to be said about it."""
    kv = holding.kv
    system = "no system prompt"
    if holding.tokens_system:
        system = f"{holding.tokens_system} at the front {'pinned' if holding.pinned else 'kept by position shift'}"
    rows = [
        ("tokens", f"{holding.tokens} so far, {holding.tokens_context} in the context, {system}"),
        ("KV cache", kv_share(kv.bytes, kv.bytes_full)),
    ]
    if holding.rolls:
        often = "once" if holding.rolls == 1 else f"{holding.rolls} times"
        rows.append(("rolled", f"{often}: the oldest turns were dropped"))
    if kv.layers:
        ages = zip(*holding.ages, strict=True)
        means = [sum(column) / len(column) for column in ages]
        shares = ", ".join("-" if math.isnan(m) else f"{m:.0%}" for m in means)
        rows.append(
            ("held", f"{shares} of the four quarters of the conversation, the oldest first, mean of the layers")
        )
    return rows


def _ask_terminal(prompt: str) -> str:
    with _utf8_input():
        # bytes that are no text reach input() as half characters, which no tokenizer takes
        return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _ask_pipe(prompt: str) -> str:
    with _utf8_input(), reading():
        line = sys.stdin.readline()
        line.encode()  # in the C and POSIX locales bytes that are no text come out of decoding as half characters
    if not line:
        raise EOFError
    # as editors on Windows write files: a mark in front of the first line, and two characters at the end of each
    return line.removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def _utf8_input() -> Iterator[None]:
    try:
        yield
    except UnicodeError:
        raise DepthKVError("standard input is not UTF-8 text: convert it first") from None


def _typed() -> bool:
    return readline is not None and bool(readline.get_line_buffer())


def _put(text: str) -> None:
    click.echo(text, nl=False)


def _ignore(text: str) -> None:
    pass
