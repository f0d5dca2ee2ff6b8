"""Running text through one row after another: how the prediction of each token differs from the full cache's.

The second half of each window is scored, as upstream's llama-perplexity does; its last tokens are decoded one at a
time, and timed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from depthkv_edge.engine.model import Model
from depthkv_edge.engine.stream import Occupancy, Stream, StreamState
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record

N_DECODE = 32  # tokens at the end of a window that are decoded one at a time
N_BINS = 64  # parts of the positions that occupancy is reported for
_CHUNK = 128  # tokens that a row is fed at once

OnTokens = Callable[[int], None]


def run_window(
    model: Model, rows: Sequence[Row], tokens: Sequence[int], on_tokens: OnTokens = lambda n: None
) -> dict[str, Record]:
    """Feed one window to every row: see `Reference`.

    Args:
        rows: FULL comes first.

    Returns:
        Records by row label.
    """
    with open_window(model, rows[0], tokens, None, on_tokens) as window:
        return {rows[0].label: window.record} | {row.label: window.measure(row, on_tokens) for row in rows[1:]}


@contextlib.contextmanager
def open_window(
    model: Model, full: Row, tokens: Sequence[int], directory: Path | None, on_tokens: OnTokens
) -> Iterator[Reference]:
    """Feed one window to the full cache, and keep its predictions for as long as rows are compared with them.

    Args:
        tokens: [n_ctx]
        directory: for 2 * n_ctx * n_vocab bytes of predictions. Default: the system's temporary one.
        on_tokens: called with the number of tokens that were computed since the last call.

    Raises:
        DepthKVError: the directory has no room.
    """
    with _LogProbs(directory) as log_probs, full.open(model, len(tokens)) as stream:
        yield Reference(model, stream, tokens, log_probs, on_tokens)


class Reference:
    """The predictions of the full cache for one window of text, which rows are compared with.

    Attributes:
        record: of the full cache itself; see `measure`.
    """

    def __init__(
        self, model: Model, full: Stream, tokens: Sequence[int], log_probs: _LogProbs, on_tokens: OnTokens
    ) -> None:
        n_ctx = len(tokens)
        self._model = model
        self._tokens = tokens
        self._first = n_ctx // 2
        self._last = n_ctx - min(N_DECODE, n_ctx // 8)
        self._full = full
        self._state: StreamState | None = None
        self._prefill: list[float] = []
        self._log_probs = log_probs
        self.record = self._read(full, on_tokens)

    def measure(self, row: Row, on_tokens: OnTokens = lambda n: None) -> Record:
        """Feed the window to a row.

        Returns:
            `kl` nats, `nll` nats, `top1` [n_scored] of the tokens scored; `prefill` seconds of each chunk of the
            n_prefill tokens before, and in `prefill_full` the full cache's, in the same process; `seconds` [N_DECODE]
            that each decoded token took, and in `seconds_full` the full cache in turns with it; `seen` and `layers`,
            the cache at the end.
        """
        with row.open(self._model, len(self._tokens)) as stream:
            return self._read(stream, on_tokens)

    def _read(self, stream: Stream, on_tokens: OnTokens) -> Record:
        """Where the stream is the full cache's, its predictions are kept; else they are what it is compared with."""
        scores = _Scores()
        prefill: list[float] = []
        for part in _parts(self._tokens[: self._first], _CHUNK):
            stream.feed(part)
            prefill.append(stream.last_seconds)
            on_tokens(len(part))
        if stream is self._full:
            self._prefill = prefill
        self._log_probs.rewind()
        for part in _parts(self._tokens[self._first : self._last], _CHUNK):
            self._score(stream, part, scores)
            on_tokens(len(part))
        seconds, seconds_full = self._decode(stream, scores)
        on_tokens(len(self._tokens) - self._last)
        times = {"prefill": prefill, "prefill_full": self._prefill, "n_prefill": self._first}
        times |= {"seconds": seconds, "seconds_full": seconds_full}
        return scores.to_record() | times | _occupancy(stream.occupancy(), len(self._tokens))

    def _decode(self, stream: Stream, scores: _Scores) -> tuple[list[float], list[float]]:
        """The last tokens, one at a time, in turns with the full cache: a machine slows down and recovers for both."""
        if stream is self._full:
            self._state = stream.save()
        else:
            self._full.restore(self._state)
        seconds, seconds_full = [], []
        for part in _parts(self._tokens[self._last :], 1):
            self._score(stream, part, scores)
            seconds.append(stream.last_seconds)
            if stream is not self._full:
                self._full.predict(part)
            seconds_full.append(self._full.last_seconds)
        return seconds, seconds_full

    def _score(self, stream: Stream, part: Sequence[int], scores: _Scores) -> None:
        log_p = stream.predict(part)
        if stream is self._full:
            full = log_p
            self._log_probs.append(full)
        else:
            full = self._log_probs.next(*log_p.shape)
        n_fed = len(stream.past)
        scores.add(full, log_p, self._tokens[n_fed - len(part) + 1 : n_fed + 1])


class _LogProbs:
    """Predictions on disk: those of a window are more than what a machine may have memory for."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def __enter__(self) -> _LogProbs:
        with self._writing():
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115, it is closed below
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what is still buffered goes nowhere, for want of room
            self._file.close()

    def append(self, log_p: np.ndarray) -> None:
        with self._writing():
            self._file.write(np.ascontiguousarray(log_p, np.float32).data)
            self._file.flush()

    def rewind(self) -> None:
        self._file.seek(0)

    def next(self, n: int, n_vocab: int) -> np.ndarray:
        """The next n predictions, [n, n_vocab]."""
        log_p = np.empty((n, n_vocab), np.float32)
        if self._file.readinto(log_p.data.cast("B")) != log_p.nbytes:
            raise RuntimeError("a row was scored at tokens that the full cache was not")
        return log_p

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self._directory or tempfile.gettempdir()
            way_out = "XDG_CACHE_HOME" if self._directory else "TMPDIR"
            raise DepthKVError(
                f"cannot keep predictions of the full cache in {place}: {error.strerror}; set {way_out} to a "
                "directory with room"
            ) from None


def _parts(tokens: Sequence[int], n: int) -> list[Sequence[int]]:
    return [tokens[at : at + n] for at in range(0, len(tokens), n)]


@dataclass
class _Scores:
    """How the predictions of a row differ from the full cache's, token by token."""

    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    top1: list[int] = field(default_factory=list)

    def add(self, full: np.ndarray, log_p: np.ndarray, following: Sequence[int]) -> None:
        """The last token of the text has none to follow, and no score.

        Args:
            full, log_p: log-probabilities [n, n_vocab] of the full cache and of the row.
            following: [n] tokens, or one fewer.
        """
        n = len(following)
        full, log_p = full[:n], log_p[:n]
        self.kl += (np.exp(full) * (full - log_p)).sum(axis=1, dtype=np.float64).tolist()
        self.nll += (-log_p[np.arange(n), np.array(following, int)]).astype(np.float64).tolist()
        self.top1 += (full.argmax(axis=1) == log_p.argmax(axis=1)).astype(int).tolist()

    def to_record(self) -> Record:
        return {"kl": self.kl, "nll": self.nll, "top1": self.top1}


def _occupancy(occupancy: Occupancy, n_ctx: int) -> Record:
    shares = _shares(occupancy, n_ctx)
    layers = zip(occupancy.layers, occupancy.cells, occupancy.held, shares, strict=True)
    return {
        "seen": occupancy.n_seen,
        "layers": [
            {"layer": layer, "cells": cells, "held": held, "occupancy": share} for layer, cells, held, share in layers
        ],
    }


def _shares(occupancy: Occupancy, n_ctx: int) -> list[list[float]]:
    """Of each layer, the share of the tokens that it holds in each part of the positions, [n_layers][N_BINS]."""
    edges = np.linspace(0, n_ctx, min(N_BINS, n_ctx) + 1)
    sizes = np.histogram(np.arange(n_ctx), edges)[0]
    return [np.round(np.histogram(held, edges)[0] / sizes, 4).tolist() for held in occupancy.positions]
