"""Greedy text after a long text: how much of it, and how far, is the full cache's."""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.metrics.agreement import agreement, first_difference
from depthkv_edge.quality.store import Record
from depthkv_edge.quality.tasks.generate import Generation
from depthkv_edge.quality.tasks.task import check_room
from depthkv_edge.quality.texts import Text, excerpt

NAME = "greedy"


def build(
    model: Model, texts: Sequence[Text], n_ctx: int, seed: int, *, n_items: int | None = None, n_predict: int = 200
) -> Generation:
    """Metric: greedy. One item for each text unless told otherwise.

    Raises:
        DepthKVError: the context or a text is too small.
    """
    room = check_room(NAME, n_ctx, len(model.bos) + n_predict)
    prompts = (
        model.bos + excerpt(model, texts[i % len(texts)], room, random.Random(f"{seed}-{NAME}-{i}"))
        for i in range(len(texts) if n_items is None else n_items)
    )
    return Generation(NAME, n_ctx, n_predict, tuple(prompts), _compare)


def _compare(reference: Record, record: Record) -> dict[str, float]:
    tokens = reference["tokens"], record["tokens"]
    return {"agreement": agreement(*tokens), "first_difference": first_difference(*tokens)}
