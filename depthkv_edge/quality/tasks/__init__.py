"""What a model is asked after a long text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from depthkv_edge.engine.model import Model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.questions import QuestionSet
from depthkv_edge.quality.tasks import greedy, instruction, qa, retrieval, summary, variables, words
from depthkv_edge.quality.tasks.task import Task
from depthkv_edge.quality.texts import Text

TASKS = {
    "retrieval": "a pass key and named keys hidden in a text (arXiv 2305.16300, 2404.06654)",
    "qa": "questions of --questions, after a document that answers them among others: exact match, F1, log-probability",
    "variables": "the value at the end of a chain of assignments (RULER, arXiv 2404.06654)",
    "words": "the most common words of a long list (RULER, arXiv 2404.06654)",
    "instruction": "a system prompt before a long document, pinned and not (arXiv 2510.00231)",
    "greedy": "200 greedy tokens against the full cache's",
    "summary": "a summary against the full cache's, by ROUGE (arXiv 2604.24647)",
}

_BUILDERS = {module.NAME: module.build for module in (retrieval, variables, words, instruction, greedy, summary)}


def build_tasks(
    names: Sequence[str],
    model: Model,
    texts: Sequence[Text],
    n_ctx: int,
    seed: int,
    *,
    n_items: Mapping[str, int] | None = None,
    questions: Sequence[QuestionSet] = (),
) -> list[Task]:
    """Tasks by name, in the order given, everything tokenised.

    An item is the same in every run with the same seed, model, context and texts, however many there are.

    Args:
        n_items: of a task, by name; the task's own number for those not named.
        questions: that the task of that kind asks.

    Raises:
        DepthKVError: a name is not known, the context or a text is too small, the model's chat template is broken.
    """
    for name in names:
        if name not in TASKS:
            raise DepthKVError(f"task {name!r} is not known: give some of {', '.join(TASKS)}")
    counts = {name: {"n_items": n} for name, n in (n_items or {}).items()}
    tasks: list[Task] = []
    for name in names:
        if name == qa.NAME:
            tasks.append(qa.build(model, questions, n_ctx, seed, **counts.get(name, {})))
        else:
            tasks.append(_BUILDERS[name](model, texts, n_ctx, seed, **counts.get(name, {})))
    return tasks
