"""From the timings of single steps to the samples of each quantity."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from depthkv_edge.speed.schedule import Schedule, Step, deal
from depthkv_edge.speed.timing import Timing, total


@dataclass(frozen=True)
class TimedStep:
    """What one configuration took for one step of one pass."""

    n_pass: int
    step: Step
    timing: Timing


def prefill_samples(steps: Sequence[TimedStep], schedule: Schedule) -> list[Timing]:
    """Of the whole prompt: for each pass, hands of its segments that are equally deep on average."""
    samples = []
    for segments in _segments(steps, schedule):
        samples += [total([segments[i] for i in hand]) for hand in deal(len(segments), schedule.hands)]
    return samples


def prefill_full_samples(steps: Sequence[TimedStep], schedule: Schedule) -> list[Timing]:
    """Of the end of the prompt: the last segments of each pass, as many as there are samples of the whole prompt."""
    samples = []
    for segments in _segments(steps, schedule):
        samples += segments[-schedule.hands :]
    return samples


def _segments(steps: Sequence[TimedStep], schedule: Schedule) -> list[list[Timing]]:
    """Of each pass, its prefill."""
    return [
        [turn.timing for turn in steps if turn.n_pass == n_pass and not turn.step.is_decode]
        for n_pass in range(schedule.passes)
    ]


def decode_samples(steps: Sequence[TimedStep], schedule: Schedule, depth: str) -> list[Timing]:
    """Of decoding at a depth: the runs, over all passes."""
    timings = [turn.timing for turn in steps if turn.step.depth == depth]
    n = schedule.run // schedule.turn
    return [total(timings[i : i + n]) for i in range(0, len(timings), n)]


def first_token_seconds(steps: Sequence[TimedStep], schedule: Schedule) -> float:
    """Time for the long prompt and one token after it, the median over the passes.

    The tokens that were decoded on the way count as if they had been prefilled, at the mean speed of the segments
    before and after them.
    """
    return statistics.median(
        _first_token([turn for turn in steps if turn.n_pass == n_pass], schedule) for n_pass in range(schedule.passes)
    )


def _first_token(steps: Sequence[TimedStep], schedule: Schedule) -> float:
    segments = [turn for turn in steps if not turn.step.is_decode]
    seconds = sum(turn.timing.seconds for turn in segments)
    for before, after in itertools.pairwise(segments):
        gap = after.step.start - before.step.end
        seconds += gap * (_per_token(before.timing) + _per_token(after.timing)) / 2
    return seconds + _per_token(total([turn.timing for turn in steps if turn.step.depth == "full"]))


def _per_token(timing: Timing) -> float:
    return timing.seconds / timing.tokens
