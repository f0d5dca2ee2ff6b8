"""A long list of words, a few of which come again and again: which?

RULER's common-words extraction (arXiv 2404.06654). The common words have no order, so each is asked for in turn, after
the others are given: then there is one right answer. Not as in RULER: half of the list are common words (there a third
at most), since small models see no smaller difference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, cycle

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.tasks.prompt import follow
from depthkv_edge.quality.tasks.reading import Passage, Question, Reading
from depthkv_edge.quality.tasks.task import check_room
from depthkv_edge.quality.texts import Text

NAME = "words"

_INTRODUCTION = (
    "Below is a list of words. Some appear more often than others. Memorize the ones that appear most often.\n\n"
)
_QUESTION = (
    "\n\nQuestion: What are the {n} most common words in the above list? "
    "Answer: The top {n} words that appear most often in the list are: {others},"
)
_WORDS = """
apple arrow autumn badge bakery balloon bamboo banner barrel basket beach beacon bench bishop blanket bottle branch
bridge bronze brother bucket butter button cabin cable camera candle canyon captain carbon carpet castle cattle cellar
chapel cherry chicken circle citizen cloud coffee comet copper corner cotton cousin cradle creek cricket crystal curtain
dancer desert diamond dinner doctor dollar dragon driver eagle editor elbow engine estate fabric falcon farmer feather
fence ferry fiddle finger flower forest fossil fountain frost garden garlic gate ghost giant ginger glacier glove goose
granite grape guitar hammer harbor hazel helmet hill honey horse hotel hunter iron island ivory jacket jewel journey
judge jungle kettle kitchen ladder lamp lantern lawyer leather lemon letter library lion lizard lobster lumber magnet
maple marble market meadow medal melon merchant mirror monkey moon morning motor mountain museum needle nephew night
noodle novel nurse ocean olive onion orange orchard organ oven oyster palace panel paper parrot pastor pearl pencil
pepper piano picture pigeon pillow pilot pine pirate planet plaster pocket poet pond potato powder prince prison puppet
pyramid queen rabbit radio railway rain ranch ribbon rice ring river robin rocket roof rope rose ruler sailor salad
salmon sand scarf school scissors shadow sheep shelter shirt shoulder silver singer sister sketch snow soldier spider
spoon spring squirrel stable statue stone storm street student sugar summer sunset swan table tailor teacher temple tent
theater thunder ticket tiger timber tomato tower trader train tunnel turtle uncle valley velvet vessel village violin
wagon wallet walnut water whale wheat wheel window winter wizard wolf wool writer yard zebra
""".split()


def build(
    model: Model, texts: Sequence[Text], n_ctx: int, seed: int, *, n_items: int = 2, n_common: int = 5
) -> Reading:
    """Metric: words. The texts are not read.

    Args:
        n_common: words that come again and again.

    Raises:
        DepthKVError: the context is too small.
    """
    passages = (_passage(model, n_ctx, f"{seed}-{NAME}-{i}", n_common) for i in range(n_items))
    return Reading(NAME, n_ctx, tuple(passages))


def _passage(model: Model, n_ctx: int, seed: str, n_common: int) -> Passage:
    rng = random.Random(seed)
    words = rng.sample(_WORDS, len(_WORDS))
    common, rare = words[:n_common], words[n_common:]
    questions = []
    for i, word in enumerate(common):
        others = ", ".join(common[i + 1 :] + common[:i])
        questions.append(Question(NAME, *follow(model, _QUESTION.format(n=n_common, others=others), f" {word}")))
    start = model.bos + model.tokenize(_INTRODUCTION)
    room = check_room(NAME, n_ctx, len(start) + max(question.n_tokens for question in questions))
    pieces = {word: model.tokenize(f" {word},") for word in words}
    listed: list[list[int]] = []
    for word in chain.from_iterable(zip(cycle(common), cycle(rare))):
        room -= len(pieces[word])
        if room < 0:
            break
        listed.append(pieces[word])
    rng.shuffle(listed)
    return Passage([*start, *chain.from_iterable(listed)], tuple(questions))
