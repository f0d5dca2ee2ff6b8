"""How long an evaluation will take, from a short trial of the full cache."""

from __future__ import annotations

import numpy as np

from depthkv_edge.evaluation.engine import Model
from depthkv_edge.evaluation.rows import FULL, Row
from depthkv_edge.evaluation.texts import Text

_CHUNK = 64
_N_CHUNKS = 8  # that are timed, after one that is not: it reads the weights from the disk


def tokens_per_second(model: Model, text: Text, n_ctx: int) -> float:
    """Prefill speed, the mean over a context of n_ctx tokens that begins empty.

    Attention costs more with every token before: the seconds of a chunk are taken for a straight line, through what its
    first chunks take.
    """
    n_chunks = min(1 + _N_CHUNKS, n_ctx // _CHUNK)
    tokens = model.tokenize(text.content[: 8 * n_chunks * _CHUNK])
    tokens *= 1 + n_chunks * _CHUNK // len(tokens)  # what they say does not matter
    starts = range(0, n_chunks * _CHUNK, _CHUNK)
    seconds = []
    with Row(FULL).open(model, n_ctx) as stream:
        for start in starts:
            stream.feed(tokens[start : start + _CHUNK])
            seconds.append(stream.last_seconds)
    slope, first = np.polyfit(starts[1:], seconds[1:], 1)
    return _CHUNK / max(first + max(slope, 0.0) * n_ctx / 2, min(seconds))
