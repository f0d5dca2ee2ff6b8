"""Two builds of the same code path, compared to within a percent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from depthkv_edge.bench.process import Configuration, Worker
from depthkv_edge.bench.result import Baseline
from depthkv_edge.bench.settings import Settings
from depthkv_edge.bench.speed import Timing, compare, total

DECODE_COST = 4  # times a prefilled token, roughly
_TURNS = 4


def pair_cost(settings: Settings) -> int:
    """Prefill tokens that `compare_builds` takes the time of, roughly."""
    n_prefill = (_TURNS + 1) * _prefill(settings)
    return 2 * _n_pairs(settings) * (n_prefill + DECODE_COST * settings.sizes.run)


def compare_builds(
    stock: Configuration,
    ours: Configuration,
    model: Path,
    settings: Settings,
    tokens: Sequence[int],
    advance: Callable[[int], None],
) -> Baseline:
    """Speed of `ours` against `stock`, whose libraries are another build's, and whether the logits are the same.

    Where the pages of a process lie is worth more than a percent for as long as it lives. So each sample is a pair of
    fresh processes, which take short turns in alternating order: what slows the machine down slows both.

    Args:
        advance: called with the cost of what was computed.
    """
    assert stock.library is not None
    prefill: dict[str, list[Timing]] = {stock.label: [], ours.label: []}
    decode: dict[str, list[Timing]] = {stock.label: [], ours.label: []}
    identical = True
    for n_pair in range(_n_pairs(settings)):
        order = [stock, ours] if n_pair % 2 == 0 else [ours, stock]
        with contextlib.ExitStack() as stack:
            pair = _Pair(
                [stack.enter_context(Worker(of, model, settings)) for of in order],
                tokens,
                advance,
            )
            n = _prefill(settings)
            pair.take_turns(n, n, one_by_one=False)  # the first graph is built, the first pages are touched
            for label, timing in pair.take_turns(_TURNS * n, n, one_by_one=False).items():
                prefill[label].append(timing)
            for label, timing in pair.take_turns(settings.sizes.run, settings.sizes.turn, one_by_one=True).items():
                decode[label].append(timing)
            identical &= pair.identical
            is_patched = next(worker for worker in pair.workers if worker.configuration is stock).facts().is_patched
    return Baseline(
        directory=stock.library,
        is_patched=is_patched,
        identical_logits=identical,
        prefill=compare(prefill[ours.label], prefill[stock.label], stock.label),
        decode=compare(decode[ours.label], decode[stock.label], stock.label),
    )


class _Pair:
    """Two contexts that are fed the same tokens."""

    def __init__(self, workers: list[Worker], tokens: Sequence[int], advance: Callable[[int], None]):
        self.workers = workers
        self.identical = True
        self._tokens = tokens
        self._advance = advance
        self._at = 0

    def take_turns(self, n_tokens: int, n_turn: int, *, one_by_one: bool) -> dict[str, Timing]:
        """What each takes for the next tokens, computed in turns whose order alternates."""
        timings: dict[str, list[Timing]] = {worker.configuration.label: [] for worker in self.workers}
        for start in range(self._at, self._at + n_tokens, n_turn):
            part = self._tokens[start : start + n_turn]
            for worker in self.workers:
                timings[worker.configuration.label].append(worker.compute(part, one_by_one=one_by_one))
                self._advance(len(part) * (DECODE_COST if one_by_one else 1))
            self.identical &= len({worker.logits_sha256() for worker in self.workers}) == 1
            self.workers.reverse()
        self._at += n_tokens
        return {label: total(parts) for label, parts in timings.items()}


def _n_pairs(settings: Settings) -> int:
    return settings.sizes.pairs * settings.repetitions


def _prefill(settings: Settings) -> int:
    return min(settings.sizes.pair_prefill, settings.n_ctx // 8)
