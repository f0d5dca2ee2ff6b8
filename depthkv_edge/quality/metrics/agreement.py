"""How far greedy text stays the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import eq


def agreement(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """Share of the places that hold the same token. The longer text counts: where the other has ended, none agrees."""
    return sum(map(eq, reference, tokens)) / max(len(reference), len(tokens), 1)


def first_difference(reference: Sequence[int], tokens: Sequence[int]) -> int:
    """Tokens before the first that differs; all of them if none does."""
    return sum(takewhile(bool, map(eq, reference, tokens)))
