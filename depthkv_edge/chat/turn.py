"""What is said of a conversation: of one turn, and of what its KV cache holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from depthkv_edge.engine.stats import KVStats

N_AGES = 4  # parts of the conversation, by age, that `Holding` tells apart


@dataclass(frozen=True)
class Turn:
    """One message answered.

    Attributes:
        text: the answer.
        finish: why it ended: `stop` (the model ended its turn), `length`, `context` (no position left) or `interrupt`.
        tokens_new: tokens that the message added, the template's own among them.
        tokens_evaluated: tokens computed, without those of the answer; with what had to be computed once more.
        tokens_generated: tokens of the answer.
        tokens_dropped: tokens of old turns that this one made room for itself by.
        kv: the KV cache after it.
    """

    text: str
    finish: str
    tokens_new: int
    tokens_evaluated: int
    tokens_generated: int
    tokens_dropped: int
    kv: KVStats

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON, with what `run` says of the KV cache."""
        return asdict(self) | {"kv": self.kv.summary()}


@dataclass(frozen=True)
class Holding:
    """What the KV cache still holds of a conversation.

    Attributes:
        tokens: tokens of the conversation so far.
        tokens_context: those that still have a position.
        tokens_system: those at the front that stay.
        rolls: how often old turns were dropped by position shift.
        pinned: whether the front is pinned, or kept as sink tokens.
        ages: [layers][N_AGES] share of each part of the conversation, the oldest first, that a layer holds; NaN for a
            part without tokens.
        kv: the KV cache.
    """

    tokens: int
    tokens_context: int
    tokens_system: int
    rolls: int
    pinned: bool
    ages: list[list[float]]
    kv: KVStats
