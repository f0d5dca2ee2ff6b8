"""A context is read once; then every question is asked from the same state, which it could not foresee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthkv_edge.engine.model import Model
from depthkv_edge.engine.stream import Stream
from depthkv_edge.quality.metrics.log_prob import answer_log_prob, log_prob
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record


@dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    Attributes:
        metric: where the answer counts.
        prompt: tokens that follow the context.
        answer: tokens that follow the prompt.
    """

    metric: str
    prompt: list[int]
    answer: list[int]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Passage:
    """A context and what is asked about it; with the longest question it fits n_ctx."""

    context: list[int]
    questions: tuple[Question, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.context) + sum(question.n_tokens for question in self.questions)


@dataclass(frozen=True)
class Reading:
    """Retrieval, in whatever form: the record of an item is, by metric, what `ask` returns."""

    name: str
    n_ctx: int
    passages: tuple[Passage, ...]

    @property
    def n_items(self) -> int:
        return len(self.passages)

    def cost(self, item: int) -> int:
        return self.passages[item].n_tokens

    def run(self, model: Model, row: Row, item: int) -> Record:
        with row.open(model, self.n_ctx) as stream:
            return ask(stream, self.passages[item])

    def columns(self, records: Mapping[int, Record], reference: Mapping[int, Record]) -> dict[str, Record]:
        return by_metric(list(records.values()))


def ask(stream: Stream, passage: Passage) -> Record:
    """Feed a context to an empty stream, and ask.

    Returns:
        By metric: `log_prob` nats and `exact`, a value for each question in order.
    """
    stream.feed(passage.context)
    state = stream.save()
    record: Record = {}
    for question in passage.questions:
        stream.restore(state)
        stream.feed(question.prompt[:-1])
        log_probs = stream.predict([question.prompt[-1], *question.answer[:-1]])
        value, exact = answer_log_prob(log_probs, question.answer)
        answers = record.setdefault(question.metric, {"log_prob": [], "exact": []})
        answers["log_prob"].append(value)
        answers["exact"].append(exact)
    return record


def by_metric(records: Sequence[Record]) -> dict[str, Record]:
    """Numbers of each metric of what `ask` returned."""
    return {metric: log_prob([record[metric] for record in records]) for metric in records[0]}
