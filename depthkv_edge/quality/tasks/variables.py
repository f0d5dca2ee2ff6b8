"""Variables that are assigned to each other in a long text: what is the last one worth?

RULER's variable tracking (arXiv 2404.06654). Not as in RULER: it asks for all the names that share a value, here each
chain is asked for the value at its end, and there is one assignment of a variable to another, not four: small models
follow no more. As there, an example comes before the question.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.quality.tasks.haystack import hide
from depthkv_edge.quality.tasks.prompt import follow
from depthkv_edge.quality.tasks.reading import Passage, Question, Reading
from depthkv_edge.quality.texts import Text

NAME = "variables"

_QUESTION = (
    "\n\nVAR AB = 31415. VAR AC = VAR AB.\n\nQuestion: What is the value of VAR AC? "
    "Answer: The value of VAR AC is: 31415.\n\nQuestion: What is the value of VAR {name} in the text above? "
    "Answer: The value of VAR {name} is:"
)


def build(
    model: Model,
    texts: Sequence[Text],
    n_ctx: int,
    seed: int,
    *,
    n_items: int = 2,
    n_chains: int = 4,
    n_hops: int = 1,
) -> Reading:
    """Metric: variables.

    Args:
        n_chains: of an item.
        n_hops: assignments of a variable to another in each chain.

    Raises:
        DepthKVError: the context or a text is too small.
    """
    passages = (
        _passage(model, texts[i % len(texts)], n_ctx, f"{seed}-{NAME}-{i}", n_chains, n_hops) for i in range(n_items)
    )
    return Reading(NAME, n_ctx, tuple(passages))


def _passage(model: Model, text: Text, n_ctx: int, seed: str, n_chains: int, n_hops: int) -> Passage:
    rng = random.Random(seed)
    names = [f"X{number}" for number in rng.sample(range(10, 100), n_chains * (n_hops + 1))]
    chains = [names[i::n_chains] for i in range(n_chains)]
    values = rng.sample(range(10_000, 100_000), n_chains)
    # all first links come before all second ones
    links = [[f"VAR {chain[0]} = {value}." for chain, value in zip(chains, values, strict=True)]]
    links += [[f"VAR {chain[i + 1]} = VAR {chain[i]}." for chain in chains] for i in range(n_hops)]
    questions = [
        Question(NAME, *follow(model, _QUESTION.format(name=chain[-1]), f" {value}"))
        for chain, value in zip(chains, values, strict=True)
    ]
    return hide(NAME, model, text, n_ctx, [needle for link in links for needle in link], questions, rng)
