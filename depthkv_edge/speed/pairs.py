"""Two builds of the same code path, compared to within a percent."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from depthkv_edge.speed.bench_settings import BenchSettings
from depthkv_edge.speed.process import Configuration, Worker
from depthkv_edge.speed.result import Baseline, PairRatio

DECODE_COST = 4  # times a prefilled token, roughly
_WARM_UP = 4  # turns: the first graph is built, the first pages are touched
_N_BOOTSTRAP = 2000


def pair_cost(settings: BenchSettings) -> int:
    """Prefill tokens that `compare_builds` takes the time of, roughly."""
    sizes = settings.sizes
    n_prefill = (_WARM_UP + sizes.pair_turns) * _n_prefill(settings)
    return 2 * _n_pairs(settings) * (n_prefill + DECODE_COST * _n_decode(settings))


def compare_builds(
    stock: Configuration,
    ours: Configuration,
    model: Path,
    settings: BenchSettings,
    tokens: Sequence[int],
    advance: Callable[[int], None],
) -> Baseline:
    """Speed of `ours` against `stock`, whose libraries are another build's, and whether the logits are the same.

    What disturbs a machine for a tenth of a second is worth 10 %, and where the pages of a process lie may be worth
    one for as long as it lives. So there are several pairs of fresh processes, each takes turns as short as one token
    in alternating order, and only turns that follow each other are compared.

    Args:
        advance: called with the cost of what was computed.
    """
    assert stock.library is not None
    prefill: list[list[float]] = []
    decode: list[list[float]] = []
    identical = True
    for n_pair in range(_n_pairs(settings)):
        order = [stock, ours] if n_pair % 2 == 0 else [ours, stock]
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(of, model, settings)) for of in order]
            pair = _Pair(workers, stock, tokens, advance)
            n = _n_prefill(settings)
            pair.take_turns(_WARM_UP, n, one_by_one=False)
            prefill.append(pair.take_turns(settings.sizes.pair_turns, n, one_by_one=False))
            decode.append(pair.take_turns(_n_decode(settings), 1, one_by_one=True))
            identical &= pair.identical
            is_patched = next(worker for worker in workers if worker.configuration is stock).facts().is_patched
    return Baseline(
        directory=stock.library,
        is_patched=is_patched,
        identical_logits=identical,
        prefill=pair_ratio(prefill),
        decode=pair_ratio(decode),
    )


def pair_ratio(ratios: Sequence[Sequence[float]]) -> PairRatio:
    """The median over the turns of all pairs, and how sure it is.

    Args:
        ratios: of the turns of each pair.
    """
    medians = [statistics.median(pair) for pair in ratios]
    rng = np.random.default_rng(0)
    draws = rng.integers(len(ratios), size=(_N_BOOTSTRAP, len(ratios)))
    resampled = [np.median(np.concatenate([ratios[i] for i in draw])) for draw in draws]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return PairRatio(
        ratio=statistics.median(ratio for pair in ratios for ratio in pair),
        interval=(float(low), float(high)),
        low=min(medians),
        high=max(medians),
        n=len(ratios),
    )


class _Pair:
    """Two contexts that are fed the same tokens."""

    def __init__(
        self,
        workers: Sequence[Worker],
        stock: Configuration,
        tokens: Sequence[int],
        advance: Callable[[int], None],
    ):
        self.identical = True
        self._workers = list(workers)
        self._stock = stock
        self._tokens = tokens
        self._advance = advance
        self._at = 0

    def take_turns(self, n: int, n_tokens: int, *, one_by_one: bool) -> list[float]:
        """Let each take n turns of n_tokens; how many times faster than stock the other was in each."""
        ratios = []
        for _ in range(n):
            part = self._tokens[self._at : self._at + n_tokens]
            seconds = {}
            for worker in self._workers:
                seconds[worker.configuration is self._stock] = worker.compute(part, one_by_one=one_by_one).seconds
                self._advance(len(part) * (DECODE_COST if one_by_one else 1))
            ratios.append(seconds[True] / seconds[False])
            self.identical &= len({worker.logits_sha256() for worker in self._workers}) == 1
            self._workers.reverse()
            self._at += n_tokens
        return ratios


def _n_pairs(settings: BenchSettings) -> int:
    return settings.sizes.pairs * settings.repetitions


def _n_prefill(settings: BenchSettings) -> int:
    """Tokens of one turn in prefill, so that all of them fill little more than half of the smallest context."""
    return min(settings.sizes.pair_prefill, settings.n_ctx // 32)


def _n_decode(settings: BenchSettings) -> int:
    return min(settings.sizes.pair_decode, settings.n_ctx // 8)
