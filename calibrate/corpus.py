"""The text that calibration reads: windows drawn from distinct places of texts of different kinds."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from depthkv_edge.calibrate.recall import build_window
from depthkv_edge.errors import DepthKVError

_FIELDS = ("text", "content")  # of a JSON line, in order of preference

# characters read of each text for every token that is wanted: rich enough to draw from, bounded for a huge file
_CHARACTERS_PER_TOKEN = 64

# the share of a recall window that asks, and the least tokens for it
_RECALL_TAIL, _RECALL_TAIL_MIN = 12, 128


@dataclass(frozen=True)
class CorpusText:
    """A text of one kind."""

    name: str
    content: str


@dataclass(frozen=True)
class WindowTokens:
    """A window of a text.

    Attributes:
        text: index of the text it comes from.
        tokens: the tokens, the one that begins a sequence included if the model has one.
        asked: positions of the tokens that count, ascending; none for all of the tail.
        n_tail: tokens at the end that are asked for; 0 if none is.
    """

    text: int
    tokens: tuple[int, ...]
    asked: tuple[int, ...] = ()
    n_tail: int = 0


@dataclass(frozen=True)
class Corpus:
    """What is measured, and what is held out to check the outcome.

    Attributes:
        name: the name of the corpus and the sha256 of the text that was read.
        texts: names of the texts.
        windows, held_out: windows at distinct places, the texts taken in turn.
        recall: windows at other places, in which facts are hidden and asked for.
        held_out_recall: the last window that is held out, with other facts in it.
    """

    name: str
    texts: tuple[str, ...]
    windows: tuple[WindowTokens, ...]
    held_out: tuple[WindowTokens, ...]
    recall: tuple[WindowTokens, ...] = ()
    held_out_recall: tuple[WindowTokens, ...] = ()


def default_texts(n_characters: int) -> list[CorpusText]:
    """The documentation of Python's language and the source of its standard library: two kinds, no network.

    The order is a function of the Python version.
    """
    names = sorted(topics)
    random.Random(0).shuffle(names)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(sources)
    code: list[str] = []
    for path in sources:
        if sum(map(len, code)) < n_characters:
            code.append(path.read_text(encoding="utf-8", errors="replace"))
    return [
        CorpusText("documentation", "\n\n".join(topics[name] for name in names)[:n_characters]),
        CorpusText("source", "\n\n".join(code)[:n_characters]),
    ]


def read_texts(names: Sequence[str], n_characters: int) -> list[CorpusText]:
    """The first characters of text files, JSON-lines files (field `text` or `content`) or data sets, one text each.

    Raises:
        DepthKVError: missing, unreadable, not UTF-8, or without a text field.
    """
    return [CorpusText(printable(Path(name).name), _read(name, n_characters)) for name in names]


def printable(text: str) -> str:
    """Without surrogates, which JSON and file names may hold and UTF-8 may not."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _read(name: str, n_characters: int) -> str:
    path = Path(name)
    if not path.exists():
        if path.suffix or path.is_absolute() or name.startswith("."):
            raise DepthKVError(f"corpus {name} does not exist: give a text file, a .jsonl file or the id of a data set")
        return _read_dataset(name, n_characters)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _join_lines(file, name, n_characters) if path.suffix == ".jsonl" else file.read(n_characters)
    except UnicodeDecodeError as error:
        raise DepthKVError(f"corpus {name} is not UTF-8 text (byte {error.start}): convert it first") from None
    except OSError as error:
        raise DepthKVError(f"corpus {name} cannot be read: {error.strerror}") from None


def _join_lines(lines, name: str, n_characters: int) -> str:
    parts: list[str] = []
    n = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DepthKVError(f"corpus {name}, line {number} is not JSON: {error.msg}") from None
        parts.append(_text_of(row, f"corpus {name}, line {number}"))
        n += len(parts[-1])
        if n >= n_characters:
            break
    return "\n\n".join(parts)[:n_characters]


def _read_dataset(name: str, n_characters: int) -> str:
    try:
        import datasets
    except ImportError:
        raise DepthKVError(
            f"corpus {name} is no file, and data sets need a package that is missing: run `pip install datasets`"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        return _join_lines((json.dumps(row, default=str) for row in rows), name, n_characters)
    except DepthKVError:
        raise
    except Exception as error:  # the package has errors of its own, with no other base
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DepthKVError(f"corpus {name} cannot be loaded: {why}") from None


def _text_of(row: object, where: str) -> str:
    if isinstance(row, dict):
        for field in _FIELDS:
            if isinstance(row.get(field), str):
                return printable(row[field])
    raise DepthKVError(f"{where} has no text: it needs a field {' or '.join(_FIELDS)}")


def build_corpus(
    names: Sequence[str],
    tokenize: Callable[[str], list[int]],
    first_token: int | None,
    *,
    n_windows: int,
    n_held_out: int,
    window_tokens: int,
    seed: int,
    n_recall: int = 0,
) -> Corpus:
    """Draw windows from the texts in turn, at distinct places.

    What is held out comes first, and from a beginning of each text whose length does not depend on `n_windows`:
    measuring more windows does not change it, nor does another seed, so that calibrations can be compared by it.

    Args:
        names: files or data sets; none for the default corpus.
        tokenize: tokens of a text, without any that begin a sequence.
        first_token: the token that begins a sequence, or none.

    Raises:
        DepthKVError: a text cannot be read, or there is too little of it, and the message says how much is missing; a
            window is too short for `recall.build_window`.
    """
    n_total = n_windows + n_held_out + n_recall
    n_characters = _CHARACTERS_PER_TOKEN * n_total * window_tokens
    texts = read_texts(names, n_characters) if names else default_texts(n_characters)
    head = () if first_token is None else (first_token,)
    n_body = window_tokens - len(head)

    n_first = _CHARACTERS_PER_TOKEN * n_held_out * window_tokens
    first: list[list[tuple[int, ...]]] = []
    rest: list[list[tuple[int, ...]]] = []
    n_found = n_usable = 0
    remainders: list[int] = []
    for text in texts:
        n_over = 0  # at the end of the text
        for places, part, drawn in ((first, text.content[:n_first], 0), (rest, text.content[n_first:], seed)):
            tokens = tokenize(part) if part else []
            starts = list(range(0, len(tokens) - n_body + 1, n_body))
            n_found += len(tokens)
            n_usable += len(starts)
            n_over = len(tokens) % n_body if part else n_over
            random.Random(f"{drawn} {text.name}").shuffle(starts)
            places.append([(*head, *tokens[start : start + n_body]) for start in starts[-n_total:]])
        remainders.append(n_over)
    if n_usable < n_total:
        # what is over in a text counts, if that text grows
        n_missing = n_total - n_usable
        missing = n_missing * n_body - sum(sorted(remainders, reverse=True)[:n_missing])
        raise DepthKVError(
            f"the corpus is short of {missing} tokens: {n_total} windows of {window_tokens} ({n_held_out} of them held "
            f"out) need {n_total * n_body}, and it has {n_found}; give more text, fewer windows or shorter ones"
        )

    held_out = _take_turns(first, n_held_out)
    left = [a + b for a, b in zip(first, rest, strict=True)]
    if len(held_out) < n_held_out:  # of a text whose tokens are very long
        held_out += _take_turns(left, n_held_out - len(held_out))
    for text, places in zip(texts, left, strict=True):
        random.Random(f"{seed} {text.name}").shuffle(places)
    windows = _take_turns(left, n_windows)
    recall = [
        _hide(window, tokenize, head, random.Random(f"{seed} recall {i}"))
        for i, window in enumerate(_take_turns(left, n_recall))
    ]

    digest = hashlib.sha256("\0".join(text.content for text in texts).encode()).hexdigest()
    name = f"Python {platform.python_version()}" if not names else ", ".join(text.name for text in texts)
    return Corpus(
        f"{name} sha256:{digest}",
        tuple(text.name for text in texts),
        tuple(windows),
        tuple(held_out),
        tuple(recall),
        tuple(_hide(window, tokenize, head, random.Random("held out")) for window in held_out[-1:] if n_recall),
    )


def _hide(
    window: WindowTokens, tokenize: Callable[[str], list[int]], head: tuple[int, ...], rng: random.Random
) -> WindowTokens:
    """The same text with facts in it, cut at the end where they are asked for."""
    text = window.tokens[len(head) :]
    made = build_window(tokenize, text, len(text), max(len(text) // _RECALL_TAIL, _RECALL_TAIL_MIN), rng)
    asked = tuple(len(head) + at for at in made.asked)
    return WindowTokens(window.text, (*head, *made.tokens), asked, made.n_tail)


def _take_turns(places: list[list[tuple[int, ...]]], n: int) -> list[WindowTokens]:
    """The last places of the texts in turn, which are taken out: `n` of them, or all there are."""
    taken: list[WindowTokens] = []
    while len(taken) < n and any(places):
        for index, of_text in enumerate(places):
            if of_text and len(taken) < n:
                taken.append(WindowTokens(index, of_text.pop()))
    return taken
