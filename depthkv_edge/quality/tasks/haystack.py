"""Statements hidden in running text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.tasks.reading import Passage, Question
from depthkv_edge.quality.tasks.task import check_room
from depthkv_edge.quality.texts import Text, excerpt


def hide(
    task: str,
    model: Model,
    text: Text,
    n_ctx: int,
    needles: Sequence[str],
    questions: Sequence[Question],
    rng: random.Random,
) -> Passage:
    """A text with needles at depths spread evenly, in the order given, that fills n_ctx with the longest question.

    Raises:
        DepthKVError: the context or the text is too small.
    """
    pieces = [model.tokenize(f"\n\n{needle}\n\n") for needle in needles]
    n_asked = max(question.n_tokens for question in questions)
    room = check_room(task, n_ctx, len(model.bos) + sum(map(len, pieces)) + n_asked)
    filler = excerpt(model, text, room, rng)
    context, done = list(model.bos), 0
    for i, piece in enumerate(pieces):
        depth = round(room * (i + 0.5) / len(pieces))
        context += filler[done:depth] + piece
        done = depth
    return Passage(context + filler[done:], tuple(questions))
