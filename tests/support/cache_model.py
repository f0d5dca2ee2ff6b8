"""What a layer may hold after any order of calls, told without the engine: tokens have names, evictions are remembered.

A token is a number that grows with every decode, whatever its position. So a copy, a shift or a restored state keeps
its tokens, and a token that is computed again is another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Eviction:
    """One or more cells freed in a layer: the last token that the sequence had by then, and the tokens that went."""

    last: int
    tokens: frozenset[int]


@dataclass
class Sequence:
    """The tokens of a sequence by position, and what each layer has lost.

    Attributes:
        tokens: position and name, in order. After a division several share a position.
        evictions: [layers] what each has evicted since the sequence was last empty.
        pins: pinned positions.
        is_plain: only ever appended to, a ubatch at a time, and cut at its end: what can be taken back is known.
        is_divided: tokens share positions, so what a layer has lost is known by number only.
    """

    n_layers: int
    tokens: list[tuple[int, int]] = field(default_factory=list)
    evictions: list[list[Eviction]] = field(default_factory=list)
    pins: set[int] = field(default_factory=set)
    is_plain: bool = True
    is_divided: bool = False

    def __post_init__(self) -> None:
        self.evictions = self.evictions or [[] for _ in range(self.n_layers)]

    @property
    def end(self) -> int:
        """The position after the last one."""
        return max((p for p, _ in self.tokens), default=-1) + 1

    def copy(self) -> Sequence:
        return replace(self, tokens=[*self.tokens], evictions=[[*layer] for layer in self.evictions], pins={*self.pins})

    def clear(self) -> None:
        self.tokens, self.pins, self.is_plain, self.is_divided = [], set(), True, False
        self.evictions = [[] for _ in range(self.n_layers)]

    def lost(self, layer: int) -> set[int]:
        """Tokens of the sequence that a layer has evicted."""
        mine = {name for _, name in self.tokens}
        return mine & set().union(*(eviction.tokens for eviction in self.evictions[layer]))

    def held(self, layer: int) -> list[int]:
        """Positions of the tokens that a layer holds, ascending."""
        lost = self.lost(layer)
        return sorted(p for p, name in self.tokens if name not in lost)

    def could_be_fresh(self, p: int) -> bool:
        """Whether a fresh evaluation of what is before position p could have left what the layers hold of it.

        An eviction matters if some of what it took is left, unless a token is left that it came no later than: then a
        fresh evaluation of what is left would have come to it too.
        """
        left = {name for q, name in self.tokens if q < p}
        return not left or all(
            eviction.tokens.isdisjoint(left) or max(left) >= eviction.last
            for layer in self.evictions
            for eviction in layer
        )

    def rm(self, p0: int, p1: float) -> None:
        if p1 < self.end and any(p0 <= p < p1 for p, _ in self.tokens):
            self.is_plain = False
        self.pins -= {p for p in self.pins if p0 <= p < min(p1, self.end)}
        self.tokens = [(p, name) for p, name in self.tokens if not p0 <= p < p1]
        if not self.tokens:
            pins = self.pins
            self.clear()
            self.pins = pins

    def add(self, p0: int, p1: float, shift: int) -> None:
        self.is_plain = False
        self._move(lambda p: p + shift if p0 <= p < p1 else p)
        self.pins = {q for p in self.pins if (q := p + shift if p0 <= p < p1 else p) >= 0}

    def div(self, p0: int, p1: float, by: int) -> None:
        self.is_plain, self.is_divided = False, True
        self.pins -= {p for p in self.pins if p0 // by <= p < p1}
        self._move(lambda p: p // by if p0 <= p < p1 else p)

    def _move(self, to: Callable[[int], int]) -> None:
        moved = [(to(p), name) for p, name in self.tokens]
        self.tokens = sorted((p, name) for p, name in moved if p >= 0)

    def append(self, names: Iterable[int]) -> None:
        begin = self.end
        self.tokens += [(begin + i, name) for i, name in enumerate(names)]

    def record(self, layer: int, end: int, held: list[int]) -> list[int]:
        """Note what a layer has evicted, as told by the positions that it holds now.

        Args:
            end: the position after the last one when it did.

        Returns:
            positions of what it has evicted.
        """
        gone = sorted((Counter(self.held(layer)) - Counter(held)).elements())
        if gone:
            lost, names, left = self.lost(layer), set(), Counter(gone)
            for p, name in self.tokens:
                if left[p] and name not in lost:
                    left[p] -= 1
                    names.add(name)
            last = max((name for p, name in self.tokens if p < end), default=-1)
            self.evictions[layer].append(Eviction(last, frozenset(names)))
        return gone
