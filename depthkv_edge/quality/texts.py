"""Long texts of different kinds, and windows of them. By default no text that calibration reads.

Scripture is fetched as data; documentation and code come from packages that are installed anyway. All may be copied
freely.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from depthkv_edge.assets import KJV, fetch
from depthkv_edge.engine.model import Model
from depthkv_edge.errors import DepthKVError

_FIRST_SAMUEL = "Now there was a certain man of Ramathaim-zophim"  # narrative from here on, no lists of names


@dataclass(frozen=True)
class Text:
    """A text of one kind."""

    name: str
    content: str


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """Text files, named by their file names, or some of `TEXTS`. A file with the name of one of these comes first.

    Raises:
        DepthKVError: a file is missing, unreadable, empty or not UTF-8, or cannot be fetched.
    """
    return [
        Text(str(path), TEXTS[str(path)]())
        if str(path) in TEXTS and not Path(path).is_file()
        else Text(Path(path).name, _read(Path(path)))
        for path in paths
    ]


def default_texts(n: int | None = None) -> list[Text]:
    """The first n of `TEXTS`, or all.

    Raises:
        DepthKVError: one is not in the cache and cannot be fetched.
    """
    return [Text(name, make()) for name, make in list(TEXTS.items())[:n]]


def windows(model: Model, text: Text, n_ctx: int, n_windows: int) -> list[list[int]]:
    """Windows of n_ctx tokens, spread evenly over a text; each begins as the model wants a sequence to begin.

    They do not overlap. Of a text far longer than they are, only the beginnings of equal stretches are tokenised.

    Raises:
        DepthKVError: the text is too short.
    """
    n = n_ctx - len(model.bos)
    edges = [_line(text.content, len(text.content) * k // n_windows) for k in range(n_windows)] + [len(text.content)]
    bodies = [_first_tokens(model, text.content[start:end], n) for start, end in pairwise(edges)]
    if any(len(body) < n for body in bodies):
        # stretches of equal length differ in tokens: take all of the text before saying that it is too short
        tokens = model.tokenize(text.content)
        if len(tokens) < n * n_windows:
            raise DepthKVError(
                f"text {text.name} has {len(tokens)} tokens, {n_windows} x {n} are needed: give a smaller context "
                f"(-c), fewer windows (--windows) or a longer text (--text)"
            )
        size = len(tokens) // n_windows
        bodies = [tokens[k * size :][:n] for k in range(n_windows)]
    return [model.bos + body for body in bodies]


def excerpt(model: Model, text: Text, n_tokens: int, rng: random.Random) -> list[int]:
    """n_tokens tokens of a text, from a line chosen by rng.

    Raises:
        DepthKVError: the text is too short.
    """
    start = rng.randrange(max(1, len(text.content) - _CHARACTERS * n_tokens))
    tokens = _first_tokens(model, text.content[_line(text.content, start) :], n_tokens)
    if len(tokens) < n_tokens:
        tokens = _first_tokens(model, text.content, n_tokens)
    if len(tokens) < n_tokens:
        raise DepthKVError(
            f"text {text.name} has {len(tokens)} tokens, {n_tokens} are needed to fill the context: give a smaller "
            f"context (-c) or a longer text (--text)"
        )
    return tokens


_CHARACTERS = 8  # of a token, in any text but a strange one


def _first_tokens(model: Model, content: str, n: int) -> list[int]:
    """At most n tokens; fewer only if there are no more."""
    size = _CHARACTERS * (n + 1)
    while True:
        tokens = model.tokenize(content[:size])
        # the last token of a part may be a piece of a longer one
        if len(tokens) > n or size >= len(content):
            return tokens[:n]
        size *= 4


def _line(content: str, at: int) -> int:
    """Where the first whole line from a place on begins; the end of the text if there is none."""
    return (content.find("\n", at - 1) + 1 or len(content)) if at else 0


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DepthKVError(f"text {path} is not UTF-8 (byte {error.start}): convert it first") from None
    except FileNotFoundError:
        raise DepthKVError(f"text {path} does not exist: give a text file, or one of {', '.join(TEXTS)}") from None
    except OSError as error:
        raise DepthKVError(f"text {path} cannot be read: {error.strerror}; give a text file") from None
    if not content.strip():
        raise DepthKVError(f"text {path} is empty: give a text longer than the context")
    return content


def _scripture() -> str:
    """The King James Bible from the first book of Samuel on; brackets mark what translators added, and go."""
    source = fetch(KJV).read_text(encoding="utf-8")
    bible = source.split('"""')[1]
    return bible[bible.index(_FIRST_SAMUEL) :].translate(str.maketrans("", "", "[]"))


def _documentation() -> str:
    """Docstrings of numpy: reference documentation that is not part of the Python language's."""
    import numpy

    titles: dict[str, str] = {}  # of each docstring: several names share one
    for module in (numpy, numpy.linalg, numpy.fft, numpy.random, numpy.ma, numpy.polynomial):
        for name in sorted(dir(module)):
            member = getattr(module, name)
            doc = None if name.startswith("_") or isinstance(member, ModuleType) else inspect.getdoc(member)
            if doc:
                titles.setdefault(doc, f"{module.__name__}.{name}")
    return "\n\n".join(f"{title}\n\n{doc}" for doc, title in titles.items())


def _code() -> str:
    """Source of click and rich."""
    places = [Path(place) for name in ("click", "rich") for place in find_spec(name).submodule_search_locations]
    paths = [path for place in places for path in sorted(place.glob("[a-z]*.py"))]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


# of different kinds, all English
TEXTS = {"scripture": _scripture, "documentation": _documentation, "code": _code}
