"""Text that a row continues with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from depthkv_edge.engine.model import Model
from depthkv_edge.engine.stream import Stream
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record
from depthkv_edge.quality.tasks.task import DECODE_COST


class Compare(Protocol):
    """Numbers of a record against the full cache's record of the same item."""

    def __call__(self, reference: Record, record: Record) -> dict[str, float]: ...


@dataclass(frozen=True)
class Generation:
    """Greedy text after a prompt. The record of an item: `tokens`, and the same as `text`.

    Attributes:
        prompts: tokens of each item; with n_predict more they fit n_ctx.
        compare: its numbers are averaged over the items.
    """

    name: str
    n_ctx: int
    n_predict: int
    prompts: tuple[list[int], ...]
    compare: Compare

    @property
    def n_items(self) -> int:
        return len(self.prompts)

    def cost(self, item: int) -> int:
        return len(self.prompts[item]) + DECODE_COST * self.n_predict

    def run(self, model: Model, row: Row, item: int) -> Record:
        with row.open(model, self.n_ctx) as stream:
            tokens = generate(stream, self.prompts[item], self.n_predict)
        return {"tokens": tokens, "text": model.detokenize(tokens)}

    def columns(self, records: Mapping[int, Record], reference: Mapping[int, Record]) -> dict[str, Record]:
        numbers = [self.compare(reference[item], record) for item, record in records.items()]
        return {self.name: {key: fmean(each[key] for each in numbers) for key in numbers[0]} | {"n": len(numbers)}}


def generate(stream: Stream, prompt: Sequence[int], n: int) -> list[int]:
    """The most likely tokens after a prompt, at most n. One that ends the model's turn is the last, and counts."""
    tokens: list[int] = []
    following = prompt
    while len(tokens) < n and not (tokens and stream.model.is_end(tokens[-1])):
        tokens.append(stream.next_token(following))
        following = tokens[-1:]
    return tokens
