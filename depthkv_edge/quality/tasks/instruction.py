"""Does a system prompt still count after a long document, pinned and not?

Eviction forgets instructions first (arXiv 2510.00231). The system prompt says how an answer must begin, a document
follows, then a question about it; how likely the demanded beginning is tells whether the instruction is followed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depthkv_edge.engine.model import Model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record
from depthkv_edge.quality.tasks.prompt import follow, frame
from depthkv_edge.quality.tasks.reading import Passage, Question, ask, by_metric
from depthkv_edge.quality.tasks.task import check_room
from depthkv_edge.quality.texts import Text, excerpt

NAME = "instruction"
PINNED, UNPINNED = "instruction_pinned", "instruction_unpinned"

_QUESTION = (
    "What is the text above about? Remember the instructions of the system prompt: start your answer as it says."
)


@dataclass(frozen=True)
class Instruction:
    """A system prompt, and how it wants every answer to begin."""

    system: str
    beginning: str


# an example, and a question that reminds of the system prompt: without them small models forget it with all of the text
INSTRUCTIONS = (
    Instruction(
        "Every answer starts like this:\nDear reader, the text is about a garden.",
        "Dear reader,",
    ),
    Instruction(
        'You are Orion. Every answer must start with "Orion here:". For example: "Orion here: this is about gardens."',
        "Orion here:",
    ),
    Instruction(
        "Answer in one line of this form: Topic = <a few words>. For example: Topic = a garden in summer.",
        "Topic =",
    ),
)


@dataclass(frozen=True)
class InstructionTask:
    """The record of an item has both metrics, each as `depthkv_edge.quality.tasks.reading.ask` returns it.

    Without the first where the cache refuses to pin.

    Attributes:
        passages: context and the one question.
        n_system: tokens at the front of each to pin.
    """

    n_ctx: int
    passages: tuple[Passage, ...]
    n_system: tuple[int, ...]
    name: str = NAME

    @property
    def n_items(self) -> int:
        return len(self.passages)

    def cost(self, item: int) -> int:
        return 2 * self.passages[item].n_tokens

    def run(self, model: Model, row: Row, item: int) -> Record:
        passage = self.passages[item]
        with row.open(model, self.n_ctx) as stream:
            (unpinned,) = ask(stream, passage).values()
            if not stream.stats().active:  # a stock cache has nothing to pin
                return {PINNED: unpinned, UNPINNED: unpinned}
            stream.clear()
            try:
                stream.pin(0, self.n_system[item])
            except DepthKVError as error:  # the smallest layer has no room beside it
                return {UNPINNED: unpinned, "refused": str(error)}
            (pinned,) = ask(stream, passage).values()
        return {PINNED: pinned, UNPINNED: unpinned}

    def columns(self, records: Mapping[int, Record], reference: Mapping[int, Record]) -> dict[str, Record]:
        metrics = [metric for metric in (PINNED, UNPINNED) if all(metric in record for record in records.values())]
        return by_metric([{metric: record[metric] for metric in metrics} for record in records.values()])


def build(model: Model, texts: Sequence[Text], n_ctx: int, seed: int, *, n_items: int = 6) -> InstructionTask:
    """Metrics: instruction_pinned, instruction_unpinned. The instructions in turn, over the texts in turn.

    Raises:
        DepthKVError: the context or a text is too small, or the model's chat template is broken.
    """
    passages, n_system = [], []
    for i in range(n_items):
        text, instruction = divmod(i, len(INSTRUCTIONS))
        wanted = INSTRUCTIONS[instruction]
        around = frame(model, _QUESTION, wanted.system)
        question = Question(NAME, *follow(model, around.tail, wanted.beginning))
        room = check_room(NAME, n_ctx, len(around.head) + question.n_tokens)
        document = excerpt(model, texts[text % len(texts)], room, random.Random(f"{seed}-{NAME}-{i}"))
        passages.append(Passage(around.head + document, (question,)))
        n_system.append(len(around.head))
    return InstructionTask(n_ctx, tuple(passages), tuple(n_system))
