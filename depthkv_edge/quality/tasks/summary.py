"""Summaries of long documents against the full cache's, by ROUGE: the task of DepthKV's paper (arXiv 2604.24647).

Not as there: the reference is what the model itself writes with all of its cache, not what a human wrote.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.metrics.rouge import rouge
from depthkv_edge.quality.store import Record
from depthkv_edge.quality.tasks.generate import Generation
from depthkv_edge.quality.tasks.prompt import frame
from depthkv_edge.quality.tasks.task import check_room
from depthkv_edge.quality.texts import Text, excerpt

NAME = "summary"

_QUESTION = "Summarize the text above in a few sentences."


def build(
    model: Model, texts: Sequence[Text], n_ctx: int, seed: int, *, n_items: int | None = None, n_predict: int = 160
) -> Generation:
    """Metric: summary. One item for each text unless told otherwise.

    Raises:
        DepthKVError: the context or a text is too small, or the model's chat template is broken.
    """
    around = frame(model, _QUESTION)
    tail = model.tokenize(around.tail, special=True)
    room = check_room(NAME, n_ctx, len(around.head) + len(tail) + n_predict)
    prompts = (
        around.head + excerpt(model, texts[i % len(texts)], room, random.Random(f"{seed}-{NAME}-{i}")) + tail
        for i in range(len(texts) if n_items is None else n_items)
    )
    return Generation(NAME, n_ctx, n_predict, tuple(prompts), _compare)


def _compare(reference: Record, record: Record) -> dict[str, float]:
    return rouge(reference["text"], record["text"])
