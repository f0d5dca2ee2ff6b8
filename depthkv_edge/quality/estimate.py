"""How long an evaluation will take, from a short trial of the full cache."""

from __future__ import annotations

from statistics import median

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.rows import FULL, Row
from depthkv_edge.quality.texts import Text

_CHUNK = 32
_N_CHUNKS = 3  # that are timed at each of two places
_MOST_DEPTH = 1024  # tokens: where the second place is, at the most


def tokens_per_second(model: Model, text: Text, n_ctx: int) -> float:
    """Prefill speed, the mean over a context of n_ctx tokens that begins empty.

    Attention costs more with every token before. What a chunk takes is taken for a straight line through two places.
    """
    first_end = (1 + _N_CHUNKS) * _CHUNK
    depth = max(first_end, min(n_ctx // 4, _MOST_DEPTH))
    n_tokens = depth + _N_CHUNKS * _CHUNK
    tokens = model.tokenize(text.content[: 8 * n_tokens])
    tokens *= 1 + n_tokens // len(tokens)  # what they say does not matter
    with Row(FULL).open(model, max(n_ctx, n_tokens)) as stream:

        def chunk_seconds() -> float:
            seconds = []
            for _ in range(_N_CHUNKS):
                stream.feed(tokens[len(stream.past) :][:_CHUNK])
                seconds.append(stream.last_seconds)
            return median(seconds)

        stream.feed(tokens[:_CHUNK])  # reads the weights from the disk
        first = chunk_seconds()
        stream.feed(tokens[first_end:depth])
        slope = (chunk_seconds() - first) / (depth - _CHUNK)
    return _CHUNK / (first + max(slope, 0.0) * n_ctx / 2)
