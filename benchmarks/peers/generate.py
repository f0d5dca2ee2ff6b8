"""Items from texts: what `depthkv-edge eval` reads and asks."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.plan import Question, Retrieval, Window
from depthkv_edge.engine.model import Model
from depthkv_edge.quality.tasks import retrieval
from depthkv_edge.quality.texts import Text, windows


def make_windows(model: Model, texts: Sequence[Text], n_tokens: int, n_prompt: int, n_windows: int) -> list[Window]:
    """Some windows of every text.

    Raises:
        DepthKVError: a text is too short.
    """
    return [
        Window(text.name, tokens, n_prompt)
        for text in texts
        for tokens in (windows(model, text, n_tokens, n_windows) if n_windows else ())
    ]


def make_retrievals(
    model: Model, texts: Sequence[Text], n_tokens: int, n_contexts: int, n_keys: int, seed: int = 0
) -> list[Retrieval]:
    """Contexts that hide a pass key and named keys, spread evenly over them; each is asked for after the context.

    Args:
        texts: taken in turn.
        n_tokens: of a context with its longest question.
        n_keys: named ones, in each context.

    Raises:
        DepthKVError: the context or a text is too small.
    """
    if not n_contexts:
        return []
    reading = retrieval.build(model, texts, n_tokens, seed, n_items=n_contexts, n_keys=n_keys)
    return [
        Retrieval(
            texts[i % len(texts)].name,
            passage.context,
            [Question(question.metric, question.prompt, question.answer) for question in passage.questions],
        )
        for i, passage in enumerate(reading.passages)
    ]
