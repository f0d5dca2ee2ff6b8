"""What a task is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from depthkv_edge.engine.model import Model
from depthkv_edge.errors import DepthKVError
from depthkv_edge.quality.rows import Row
from depthkv_edge.quality.store import Record

DECODE_COST = 8  # prompt tokens that are computed in the time of one that is generated
MIN_FILLER = 64  # tokens of text below which a context is no context


class Task(Protocol):
    """Measures one row on one item at a time. An item depends on seed, model, context and texts, never on the row."""

    @property
    def name(self) -> str: ...

    @property
    def n_items(self) -> int: ...

    def cost(self, item: int) -> int:
        """Tokens that a row computes for an item, roughly; a generated one counts DECODE_COST."""

    def run(self, model: Model, row: Row, item: int) -> Record:
        """Raw values of a row on an item, for JSON."""

    def columns(self, records: Mapping[int, Record], reference: Mapping[int, Record]) -> dict[str, Record]:
        """Numbers of a row by metric, from its records and the full cache's, both by item."""


def check_room(task: str, n_ctx: int, n_fixed: int) -> int:
    """Tokens of text that a context has room for.

    Args:
        n_fixed: tokens of everything else.

    Raises:
        DepthKVError: fewer than MIN_FILLER.
    """
    if n_ctx < n_fixed + MIN_FILLER:
        raise DepthKVError(
            f"task {task} does not fit a context of {n_ctx} tokens: give -c {n_fixed + MIN_FILLER} or more"
        )
    return n_ctx - n_fixed
