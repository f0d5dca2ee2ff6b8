"""Which tokens are computed when: the same for every configuration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from depthkv_edge.speed.bench_settings import BenchSettings

DEPTHS = ("empty", "quarter", "half", "full")


@dataclass(frozen=True)
class Step:
    """One turn of every configuration: tokens [start, end), all at once, or one by one at a named depth."""

    start: int
    end: int
    depth: str = ""

    @property
    def is_decode(self) -> bool:
        return bool(self.depth)

    @property
    def n_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Schedule:
    """A prompt that fills the context, interrupted at each depth to decode.

    What is decoded stays: a context is never rewound or restored. So every number comes from cells that lie as
    they do in use, evictions come as often as in use, and no saved state adds to the memory of the process.

    Attributes:
        n_ctx: positions of the context.
        segment: most prefill tokens of a turn.
        run: decode tokens of a repetition.
        turn: decode tokens of a turn.
        runs: repetitions at each depth, in one pass.
        passes: how often the context is filled from empty.
        hands: samples of prefill speed in one pass, at most.
        depths: position at which decoding starts, by name.
    """

    n_ctx: int
    segment: int
    run: int
    turn: int
    runs: int
    passes: int
    hands: int
    depths: dict[str, int]

    @property
    def n_decoded(self) -> int:
        """Tokens decoded at one depth in one pass."""
        return self.runs * self.run

    @property
    def n_prompt(self) -> int:
        """Tokens before the last depth: the long prompt."""
        return self.depths["full"]

    def steps(self) -> Iterator[Step | None]:
        """The steps of one pass, in order; None where the context is emptied."""
        yield None
        yield from self._decode("empty")
        yield None
        for depth, (start, end) in zip(DEPTHS[1:], self.stretches(), strict=True):
            # even parts: a short one at the end would be slower for its size alone
            n = math.ceil((end - start) / self.segment)
            cuts = [start + (end - start) * i // n for i in range(n + 1)]
            yield from (Step(*cut) for cut in itertools.pairwise(cuts))
            yield from self._decode(depth)

    def stretches(self) -> list[tuple[int, int]]:
        """What is prefilled between two depths, as tokens [start, end)."""
        stops = [self.depths[depth] for depth in DEPTHS[1:]]
        return [(0, stops[0]), *((a + self.n_decoded, b) for a, b in itertools.pairwise(stops))]

    def _decode(self, depth: str) -> Iterator[Step]:
        start = self.depths[depth]
        for at in range(start, start + self.n_decoded, self.turn):
            yield Step(at, at + self.turn, depth)


def make_schedule(n_ctx: int, settings: BenchSettings) -> Schedule:
    """Divide a context of n_ctx positions.

    At each depth a pass decodes at most a sixteenth of the context, or the depth would not be one. If that is too
    little for the repetitions, or the context is short, it is filled more than once.
    """
    sizes, repetitions = settings.sizes, settings.repetitions
    segment = min(sizes.segment, n_ctx // 4)
    room = n_ctx // 16
    turn = min(sizes.turn, room)
    run = min(sizes.run, room) // turn * turn
    passes = max(math.ceil(repetitions / (room // run)), min(repetitions, round(sizes.prompt / n_ctx)))
    runs = math.ceil(repetitions / passes)
    depths = {"empty": 0, "quarter": n_ctx // 4, "half": n_ctx // 2, "full": n_ctx - runs * run}
    return Schedule(n_ctx, segment, run, turn, runs, passes, math.ceil(repetitions / passes), depths)


def deal(n_segments: int, n_hands: int) -> list[list[int]]:
    """Deal the segments of a prompt into hands, each about as deep as any other on average.

    Later segments take longer. Times of whole hands can be compared with each other all the same: so one pass over a
    prompt gives several samples of its speed.

    Returns:
        The segments of each hand.
    """
    n = min(n_hands, n_segments)
    hands: list[list[int]] = [[] for _ in range(n)]
    for i in range(n_segments):
        # to and fro, as teams are picked
        hands[i % n if i // n % 2 == 0 else n - 1 - i % n].append(i)
    return hands
