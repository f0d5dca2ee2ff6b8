"""What is compared: method names on a command line, as configurations of the engine and of stock behaviour."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from depthkv_edge.engine.context import plan_context
from depthkv_edge.engine.model import KV_TYPES, Cache, Model, options
from depthkv_edge.engine.stream import Stream
from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.keys import read_calibration
from depthkv_edge.quality.bounded import open_stream

METHODS = {
    "depth": "layers sized by calibrated sensitivity, the model's scorer",
    "uniform": "layers of equal size, the same scorer",
    "streaming": "layers of equal size, sinks and the most recent tokens (arXiv 2309.17453)",
    "window": "layers of equal size, attention of the last queries (SnapKV's score, arXiv 2404.14469)",
    "truncate": "stock, a smaller window whose younger half is read again when it is full",
    "context-shift": "stock, a smaller window that llama.cpp shifts when it is full",
    "kv-q8_0": "stock, K and V in q8_0",
    "kv-q4_0": "stock, K and V in q4_0",
    "shuffled": "control: the layer sizes of depth, dealt to other layers",
    "random": "control: layers of equal size, random tokens are evicted",
}
DEFAULT_METHODS = ("depth", "uniform", "streaming", "kv-q8_0", "kv-q4_0")
QUICK_METHODS = ("depth", "uniform", "kv-q8_0")
FULL_METHODS = (*METHODS, "depth+kv-q8_0")
DEFAULT_BUDGETS = (0.2, 0.4, 0.6)
QUICK_BUDGETS = (0.4,)

FULL, NOISE = "full", "noise"
# Another batch size, no multiple of a kernel's tile, and the other attention kernel: neither should matter. On a CPU
# the batch size alone changes nothing, bit for bit.
_NOISE_CACHE = Cache(n_ubatch=100, flash_attn=True)
_ROWS_SATURATED = 2**21  # positions: beyond any sliding window, so that only the growing layers still grow

_EVICTING = ("depth", "uniform", "streaming", "window", "shuffled", "random")
_TYPES = tuple(f"kv-{name}" for name in KV_TYPES if name != "f16")


@dataclass(frozen=True)
class Row:
    """A configuration that is measured.

    Attributes:
        method: as given on the command line, or FULL or NOISE.
        budget: share of the full F16 cache's cells; None where it does not apply.
        cache: of the context.
        when_full: see `depthkv_edge.quality.bounded.STREAMS`.
        n_cells: of a stock cache smaller than the context.
    """

    method: str
    budget: float | None = None
    cache: Cache = Cache()
    when_full: str = "evict"
    n_cells: int = 0

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget:g}"

    def open(self, model: Model, n_ctx: int) -> AbstractContextManager[Stream]:
        """A stream for texts of at most n_ctx tokens."""
        return open_stream(model, n_ctx, self.cache, when_full=self.when_full, n_cells=self.n_cells)


def check_methods(names: Sequence[str]) -> None:
    """Check names without a model.

    Raises:
        DepthKVError: a name is not known, or a combination is not possible.
    """
    if not names:
        raise DepthKVError(f"no method is given: give some of {', '.join(METHODS)}")
    for name in names:
        parts = name.split("+")
        for part in parts:
            if part not in METHODS:
                raise DepthKVError(f"method {part!r} is not known: give some of {', '.join(METHODS)}, or join two by +")
        if len(parts) > 1 and (len(parts) > 2 or parts[0] in _TYPES or parts[1] not in _TYPES):
            raise DepthKVError(f"method {name!r} is no combination: join a method and a type, such as depth+kv-q8_0")
    if len(set(names)) < len(names):
        raise DepthKVError("a method is given twice: give each once")


def check_budgets(budgets: Sequence[float]) -> None:
    """Raises DepthKVError for a budget that is no fraction of the cache below 1."""
    for budget in budgets:
        if not 0 < budget < 1:
            raise DepthKVError(f"budget {budget:g} is out of range: give fractions of the full cache between 0 and 1")
    if len(set(budgets)) < len(budgets):
        raise DepthKVError("a budget is given twice: give each once")


def build_rows(
    model: Model, calibrated: Path, names: Sequence[str], budgets: Sequence[float], n_ctx: int, seed: int
) -> list[Row]:
    """FULL, NOISE, and every method at every budget, in the order given.

    Args:
        calibrated: the file that the model's calibration is read from.
        seed: of the control `shuffled`.

    Raises:
        DepthKVError: `depth` without a calibration, a budget that the engine refuses.
    """
    check_methods(names)
    if {name.split("+")[0] for name in names} & {"depth", "shuffled"} and read_calibration(calibrated) is None:
        raise DepthKVError(
            f"{calibrated} carries no calibration, which method depth needs: run `depthkv-edge calibrate {calibrated} "
            f"-o calibrated.gguf` and evaluate that, or leave depth out of --methods"
        )
    rows = [Row(FULL), Row(NOISE, cache=_NOISE_CACHE)]
    for name in names:
        method, _, kv_type = name.partition("+kv-")
        if method in _TYPES:
            rows.append(Row(name, cache=Cache(kv_type=method.removeprefix("kv-"))))
            continue
        for budget in budgets:
            row = _row(model, method, budget, n_ctx, seed)
            rows.append(replace(row, method=name, cache=replace(row.cache, kv_type=kv_type or "f16")))
    for row in rows:
        if row.method.split("+")[0] in _EVICTING:
            with row.open(model, n_ctx):  # a budget below the floor is refused now, not in an hour
                pass
    return rows


def _row(model: Model, method: str, budget: float, n_ctx: int, seed: int) -> Row:
    if method in ("truncate", "context-shift"):
        when_full = "reread" if method == "truncate" else "shift"
        return Row(method, budget, when_full=when_full, n_cells=max(2, int(budget * n_ctx)))
    caches = {
        "depth": Cache(budget),
        "uniform": Cache(budget, rule="uniform"),
        "streaming": Cache(budget, rule="uniform", scorer="streaming"),
        "window": Cache(budget, rule="uniform", scorer="window"),
        "random": Cache(budget, rule="uniform", scorer="random"),
    }
    if method in caches:
        return Row(method, budget, caches[method])
    cells = list(layer_cells(model, n_ctx, Cache(budget)))
    random.Random(seed).shuffle(cells)
    return Row(method, budget, Cache(budget, cells=tuple(cells)))


def layer_cells(model: Model, n_ctx: int, cache: Cache) -> tuple[int, ...]:
    """Cells that every growing layer gets."""
    return tuple(layer.cells for layer in plan_context(model.handle, options(model, n_ctx, cache)).kv.layers)


@dataclass(frozen=True)
class KVBytes:
    """K and V of a row, against the full F16 cache of the same context."""

    bytes: int
    bytes_full: int

    @property
    def share(self) -> float:
        return self.bytes / self.bytes_full


def kv_bytes(model: Model, row: Row, n_ctx: int) -> KVBytes:
    """Bytes of K and V of a row. A window smaller than the context counts as many cells as it may fill."""
    full = _bytes_full(model, n_ctx)
    if row.n_cells:
        growth = (_bytes_full(model, 2 * _ROWS_SATURATED) - _bytes_full(model, _ROWS_SATURATED)) / _ROWS_SATURATED
        return KVBytes(round(full - growth * (n_ctx - row.n_cells)), full)
    with row.open(model, n_ctx) as stream:
        return KVBytes(stream.stats().bytes, full)


def _bytes_full(model: Model, n_ctx: int) -> int:
    return plan_context(model.handle, options(model, n_ctx, Cache())).kv.bytes
