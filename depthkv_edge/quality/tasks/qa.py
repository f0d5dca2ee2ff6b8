"""Questions of a user's own set, after a document that holds the passages which answer them among others.

The document is made as RULER makes its question answering (arXiv 2404.06654): whole passages, the ones that answer and
others of the set, in an order that is drawn. Not as there: one document is asked many questions, one after the other
from the same state, as someone would who has read it once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthkv_edge.engine.model import Model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.metrics.answers import answers as answers_metric
from depthkv_edge.quality.metrics.answers import exact, f1
from depthkv_edge.quality.metrics.log_prob import answer_log_prob
from depthkv_edge.quality.questions import Asked, QAPassage, QuestionSet
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record
from depthkv_edge.quality.tasks.generate import generate
from depthkv_edge.quality.tasks.prompt import follow, frame
from depthkv_edge.quality.tasks.task import DECODE_COST, check_room

NAME = "qa"

_QUESTION = "Answer the question with a few words that occur in the text above, and nothing else.\nQuestion: {question}"
_N_PREDICT = 24  # tokens of an answer; a longer one is cut


@dataclass(frozen=True)
class Quiz:
    """A question as the model gets it.

    Attributes:
        prompt: tokens after the document.
        answer: tokens of the first right answer after the prompt.
        answers: all that are right.
    """

    prompt: list[int]
    answer: list[int]
    answers: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + max(len(self.answer), _N_PREDICT)


@dataclass(frozen=True)
class Document:
    """A context and what is asked about it; with the longest question and its answer it fits n_ctx."""

    context: list[int]
    questions: tuple[Quiz, ...]


@dataclass(frozen=True)
class QuestionAnswering:
    """The record of a document: `exact`, `f1`, `log_prob` and `text`, a value for each question."""

    n_ctx: int
    documents: tuple[Document, ...]
    name: str = NAME

    @property
    def n_items(self) -> int:
        return len(self.documents)

    def cost(self, item: int) -> int:
        document = self.documents[item]
        asked = sum(len(quiz.prompt) + len(quiz.answer) + DECODE_COST * 8 for quiz in document.questions)
        return len(document.context) + asked

    def run(self, model: Model, row: Row, item: int) -> Record:
        document = self.documents[item]
        record: Record = {"exact": [], "f1": [], "log_prob": [], "text": []}
        with row.open(model, self.n_ctx) as stream:
            stream.feed(document.context)
            state = stream.save()
            for quiz in document.questions:
                stream.restore(state)
                stream.feed(quiz.prompt[:-1])
                asked = stream.save()
                given = _first_line(model.detokenize(generate(stream, quiz.prompt[-1:], _N_PREDICT)))
                stream.restore(asked)
                log_probs = stream.predict([quiz.prompt[-1], *quiz.answer[:-1]])
                record["exact"].append(exact(given, quiz.answers))
                record["f1"].append(f1(given, quiz.answers))
                record["log_prob"].append(answer_log_prob(log_probs, quiz.answer)[0])
                record["text"].append(given)
        return record

    def columns(self, records: Mapping[int, Record], reference: Mapping[int, Record]) -> dict[str, Record]:
        return {NAME: answers_metric(list(records.values()), [reference[item] for item in records])}


def build(
    model: Model,
    questions: Sequence[QuestionSet],
    n_ctx: int,
    seed: int,
    *,
    n_items: int = 4,
    n_questions: int = 10,
) -> QuestionAnswering:
    """Metric: qa. Documents of the sets in turn; no question is asked twice.

    Args:
        n_questions: of a document.

    Raises:
        DepthKVError: there is no set, the sets have too few questions or passages, the context is too small, or the
            model's chat template is broken.
    """
    if not questions:
        raise DepthKVError(f"task {NAME} has no questions: give --questions FILE")
    decks = [_Deck(model, each, n_ctx, f"{seed}-{NAME}-{i}") for i, each in enumerate(questions)]
    documents = tuple(decks[i % len(decks)].deal(n_questions) for i in range(n_items))
    return QuestionAnswering(n_ctx, documents)


class _Deck:
    """The questions of one set in an order that is drawn, each dealt once."""

    def __init__(self, model: Model, questions: QuestionSet, n_ctx: int, seed: str):
        self._model = model
        self._set = questions
        self._n_ctx = n_ctx
        self._rng = random.Random(seed)
        self._head = frame(model, _QUESTION).head
        self._left = [(source, asked) for source in questions.sources for asked in source.asked]
        self._rng.shuffle(self._left)

    def deal(self, n: int) -> Document:
        """The next questions, fewer than n where their passages do not fit."""
        if not self._left:
            raise DepthKVError(
                f"questions {self._set.name} have {self._set.n_questions} questions, which is too few: give fewer "
                "documents (--items) or more questions"
            )
        asked = self._left[:n]
        room = self._room(asked)
        chosen: dict[QAPassage, list[int]] = {}
        quizzes: list[Quiz] = []
        for source, each in asked:
            tokens = chosen.get(source) or self._tokens(source)
            if len(quizzes) and source not in chosen and len(tokens) > room:
                break
            if source not in chosen:
                if len(tokens) > room:
                    raise DepthKVError(
                        f"task {NAME}: a passage of {self._set.name} has {len(tokens)} tokens, and there is room for "
                        f"{room}: give -c {self._n_ctx + len(tokens) - room} or more"
                    )
                room -= len(tokens)
                chosen[source] = tokens
            quizzes.append(self._quiz(each))
        del self._left[: len(quizzes)]
        # the rest is filled with passages that answer nothing that is asked
        others = [source for source in self._set.sources if source not in chosen]
        self._rng.shuffle(others)
        for source in others:
            tokens = self._tokens(source)
            if len(tokens) <= room:
                room -= len(tokens)
                chosen[source] = tokens
        passages = list(chosen.values())
        self._rng.shuffle(passages)
        return Document(self._head + [token for tokens in passages for token in tokens], tuple(quizzes))

    def _room(self, asked: Sequence[tuple[QAPassage, Asked]]) -> int:
        return check_room(NAME, self._n_ctx, len(self._head) + max(self._quiz(each).n_tokens for _, each in asked))

    def _quiz(self, asked: Asked) -> Quiz:
        tail = frame(self._model, _QUESTION.format(question=asked.question)).tail
        return Quiz(*follow(self._model, tail, asked.answers[0]), asked.answers)

    def _tokens(self, source: QAPassage) -> list[int]:
        title = f"{source.title.replace('_', ' ')}\n" if source.title else ""
        return self._model.tokenize(f"{title}{source.text}\n\n")


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]
