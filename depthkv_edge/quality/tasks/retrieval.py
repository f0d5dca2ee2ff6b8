"""One pass key and several named keys in one text, each asked for after all of it.

The pass key is arXiv 2305.16300's, the named ones are RULER's multi-key retrieval (2404.06654, NIAH multi-key): each
is among the others' distractors. Not as in RULER: all are asked for, one after the other, from the same state.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.tasks.haystack import hide
from depthkv_edge.quality.tasks.prompt import follow
from depthkv_edge.quality.tasks.reading import Passage, Question, Reading
from depthkv_edge.quality.texts import Text

NAME = "retrieval"

_PASS = "The pass key is: {key}. Remember it. The pass key is: {key}."
_PASS_QUESTION = "\n\nWhat is the pass key mentioned in the text? The pass key mentioned in the text is:"
_NAMED = "The special magic number for {name} is: {key}."
_NAMED_QUESTION = (
    "\n\nWhat is the special magic number for {name} mentioned in the text? "
    "The special magic number for {name} mentioned in the text is:"
)
_NAMES = (
    "Alice Anna Bella Carl Clara Daniel David Emma Eric Frank George Helen Henry Julia Karen Laura Linda Lucy Maria "
    "Martin Oscar Peter Robert Sarah Simon Sophie Thomas Victor Walter William"
).split()


def build(model: Model, texts: Sequence[Text], n_ctx: int, seed: int, *, n_items: int = 4, n_keys: int = 12) -> Reading:
    """Metrics: passkey, multikey.

    Args:
        n_keys: named keys of an item, besides its pass key.

    Raises:
        DepthKVError: the context or a text is too small.
    """
    passages = (_passage(model, texts[i % len(texts)], n_ctx, f"{seed}-{NAME}-{i}", n_keys) for i in range(n_items))
    return Reading(NAME, n_ctx, tuple(passages))


def _passage(model: Model, text: Text, n_ctx: int, seed: str, n_keys: int) -> Passage:
    rng = random.Random(seed)
    keys = [str(key) for key in rng.sample(range(10_000, 100_000), n_keys + 1)]
    names: list[str | None] = [*rng.sample(_NAMES, n_keys)]
    names.insert(rng.randrange(n_keys + 1), None)
    needles, questions = [], []
    for name, key in zip(names, keys, strict=True):
        needle, question = (_NAMED, _NAMED_QUESTION) if name else (_PASS, _PASS_QUESTION)
        needles.append(needle.format(name=name, key=key))
        asked = follow(model, question.format(name=name), f" {key}")
        questions.append(Question("multikey" if name else "passkey", *asked))
    return hide(NAME, model, text, n_ctx, needles, questions, rng)
