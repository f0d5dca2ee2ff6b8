"""What a model in a context needs in bytes, and the context and budget that fit a memory size. No weights are read.

The engine plans a context on a model without weights (`llama_model_params::no_alloc`), as llama.cpp's own
`common/fit.cpp` does, and chooses ubatch and budget for one context. The process's share is measured: what is resident
when the vocabulary is loaded and nothing else.

Weights count once. That holds if the file is not mapped into memory: a mapping stays resident beside the copies that
the CPU backend makes of tensors whose rows it reorders (Q4_0, Q4_K, Q8_0, ...). Who loads what was chosen here says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from depthkv_edge.engine import capi
from depthkv_edge.engine.budget import Budget
from depthkv_edge.engine.context import Options, Plan, has_budget, load_without_weights, plan_context, trained_ctx
from depthkv_edge.engine.devices import ON_CPU, Offload
from depthkv_edge.engine.stats import KVStats
from depthkv_edge.errors import DepthKVError
from depthkv_edge.memory import rss_bytes
from depthkv_edge.units import mib

CONTEXTS = tuple(2**i for i in range(9, 24))  # 512 to 8 million tokens: what is tried where no context is given

AS_LLAMA = Options()


@dataclass(frozen=True)
class Need:
    """Bytes that a process takes with a model in a context.

    Attributes:
        weights: the model's tensors.
        kv: K and V.
        compute: temporary buffers of the largest ubatch.
        scorer: eviction state, scoring and position shift.
        process: the interpreter, the libraries, the vocabulary.
        reserve: records of the cells, logits and candidates, what the allocator cannot use.
        on_devices: of all these what is not in the process, but in memory that devices have for themselves.
        fits_devices: they have room for it.
    """

    weights: int
    kv: int
    compute: int
    scorer: int
    process: int
    reserve: int
    on_devices: int = 0
    fits_devices: bool = True

    @classmethod
    def of(cls, kv: KVStats, process: int, fits_devices: bool = True) -> Need:
        """What the engine plans, and the process."""
        compute = kv.bytes_compute + kv.bytes_work
        parts = (kv.bytes_weights, kv.bytes, compute, kv.bytes_scorer, process, kv.bytes_other)
        return cls(*parts, min(kv.bytes_device, sum(parts) - process), fits_devices)

    @property
    def total(self) -> int:
        """All that the process takes."""
        return sum(self.parts.values()) - self.on_devices

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part, wherever they are."""
        return {name: getattr(self, name) for name in _PARTS}

    def fits(self, memory: int) -> bool:
        """Whether the process stays under a size, and the devices have room."""
        return self.fits_devices and self.total <= memory

    def to_dict(self) -> dict[str, int | bool]:
        """The same for JSON."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Fit:
    """A context and a budget that fit.

    Attributes:
        n_ctx: positions.
        kv_budget: to be given to whoever opens the context.
        n_ubatch: most tokens to compute at once, likewise.
        kv: the plan of it.
        need: bytes of it.
        memory: bytes that there are.
        rows: what was chosen and why: a name, and what is to be said about it.
    """

    n_ctx: int
    kv_budget: str
    n_ubatch: int
    kv: KVStats
    need: Need
    memory: int
    rows: tuple[tuple[str, str], ...]

    @property
    def budget(self) -> float:
        """Share of the full cache, in (0, 1]."""
        return self.kv.budget


_PARTS = ("weights", "kv", "compute", "scorer", "process", "reserve")

NeedOf = Callable[[int, float, int], Need]


@contextlib.contextmanager
def measuring(
    path: Path, options: Options = AS_LLAMA, process_bytes: int | None = None, offload: Offload = ON_CPU
) -> Iterator[NeedOf]:
    """A function from context, budget in (0, 1] and ubatch to what they need.

    It raises a DepthKVError where the engine refuses: the budget is below the floor, say, or not defined for the model.

    Args:
        process_bytes: what the process takes without the model; None: what this one does now.
        offload: where the model's layers are.

    Raises:
        DepthKVError: the model cannot be loaded.
    """
    with load_without_weights(path, offload) as model:
        process = rss_bytes() if process_bytes is None else process_bytes

        def need_of(n_ctx: int, budget: float, n_ubatch: int) -> Need:
            asked = _with_outputs(replace(options, n_ctx=n_ctx, budget=str(budget), n_ubatch=n_ubatch))
            plan = plan_context(model, asked)
            return Need.of(plan.kv, process, plan.fits)

        yield need_of


def fit_memory(
    path: Path,
    memory: int,
    n_ctx: int | None = None,
    budget: Budget | None = None,
    *,
    options: Options = AS_LLAMA,
    process_bytes: int | None = None,
    offload: Offload = ON_CPU,
) -> Fit:
    """Choose context, ubatch and budget, in this order, such that everything together stays under a memory size.

    What lies in the memory of a GPU has to fit what is free there, and does not count.

    Args:
        path: path of a GGUF.
        memory: bytes for the whole process.
        n_ctx: positions; it is kept. None: the largest power of two up to what the model was trained for that fits.
        budget: it is kept. None: the one in the file is kept, if there is one. Otherwise, and if `auto`: the full
            cache, or the largest that fits, in steps of 0.01.
        options: of the context, but for these three. Smaller ubatches are tried where it does not fit.
        process_bytes, offload: as in `measuring`.

    Raises:
        DepthKVError: nothing fits: the message names the least memory that would do. Or the engine refuses the model.
    """
    with load_without_weights(path, offload) as model:
        process = rss_bytes() if process_bytes is None else process_bytes
        search = _Search(path, memory, process, budget, _with_outputs(options), model, n_ctx)
        return search.run()


def free_memory() -> int:
    """Bytes that this process may take in all when it is to fit free memory."""
    return int(capi.llama_depthkv_memory_free()) + rss_bytes()


def contexts_up_to(n_ctx: int) -> list[int]:
    """Contexts to choose from, the largest first: powers of two, and the one that the model was trained for."""
    return sorted({n for n in CONTEXTS if n < n_ctx} | {n_ctx}, reverse=True)


def _with_outputs(options: Options) -> Options:
    # logits are reserved for every token of a ubatch, and used, that is resident, for the last one of a sequence
    return replace(options, n_outputs=options.n_seq)


@dataclass(frozen=True)
class _Search:
    path: Path
    memory: int
    process: int
    budget: Budget | None
    options: Options
    model: Any
    n_ctx: int | None

    def run(self) -> Fit:
        contexts = [self.n_ctx] if self.n_ctx else contexts_up_to(trained_ctx(self.model))
        text, origin = self._budget()
        least: tuple[int, Plan] | None = None
        for n_ctx in contexts:
            asked = replace(self.options, n_ctx=n_ctx, budget=text)
            try:
                plan = plan_context(self.model, asked, max(1, self.memory - self.process))
            except DepthKVError as error:
                if least is None:
                    raise DepthKVError(f"{self.path}: {error}") from None
                break  # what would fit is below the floor of a layer
            if plan.fits:
                return self._fit(n_ctx, plan.kv, origin)
            least = n_ctx, plan
        assert least is not None
        raise DepthKVError(self._too_little(*least))

    def _budget(self) -> tuple[str | None, str]:
        """What to ask the engine for, and where it is from; empty if it is chosen."""
        if self.budget is not None and not self.budget.is_auto:
            return self.budget.text, "as given"
        if capi.llama_depthkv_layer_count(self.model) < 0:
            if self.budget is None:
                return "1", "the full cache fits"
            raise DepthKVError(f"{self.path}: {capi.last_error()}")
        if self.budget is None and has_budget(self.model):
            return None, "as the model file says"
        return "auto", ""

    def _fit(self, n_ctx: int, kv: KVStats, origin: str) -> Fit:
        context = "as given"
        if not self.n_ctx:
            larger = [n for n in contexts_up_to(trained_ctx(self.model)) if n > n_ctx]
            context = f"the largest that fits: {larger[-1]} would not" if larger else "what the model was trained for"
        share = origin
        if not origin:
            share = "the largest that fits" if kv.active else "the full cache fits"
        need = Need.of(kv, self.process)
        rows = [
            ("memory", f"{mib(need.total)} of {mib(self.memory)} MiB: {_parts(need)}"),
            ("context", f"{n_ctx} tokens, {context}"),
            ("budget", f"{kv.budget:.3g} of the full KV cache, {share}"),
        ]
        if kv.n_ubatch < self.options.n_ubatch:
            rows.append(("ubatch", f"{kv.n_ubatch} tokens: what fits memory and the smallest layer"))
        given = self.budget is not None and not self.budget.is_auto
        kv_budget = self.budget.text if given else str(kv.budget)
        return Fit(n_ctx, kv_budget, kv.n_ubatch, kv, need, self.memory, tuple(rows))

    def _too_little(self, n_ctx: int, plan: Plan) -> str:
        kv = plan.kv
        need = Need.of(kv, self.process)
        if need.total <= self.memory:  # a device, then
            return f"{self.path.name}: {plan.reason}"
        if not kv.bytes_compute:  # so far above that not even a context was planned
            return (
                f"{mib(self.memory)} MiB is too little memory for {self.path.name} at a context of {n_ctx} tokens: K "
                f"and V alone take {mib(kv.bytes)} MiB with a budget of {kv.budget:.3g}; give more, or a smaller "
                "context"
            )
        least = f"{-(-need.total // 2**20)}MiB"
        ways = f"give {least} or more"
        if self.n_ctx:
            ways += ", or a smaller context"
        return (
            f"{mib(self.memory)} MiB is too little memory for {self.path.name} at a context of {n_ctx} tokens: the "
            f"least that would do is {least}, with a budget of {kv.budget:.3g} and a ubatch of {kv.n_ubatch} "
            f"({_parts(need)} MiB); {ways}"
        )


def _parts(need: Need) -> str:
    names = {"kv": "KV cache", "scorer": "eviction"}
    parts = ", ".join(f"{names.get(name, name)} {mib(n_bytes)}" for name, n_bytes in need.parts.items())
    return parts + (f"; {mib(need.on_devices)} of it in devices" if need.on_devices else "")
