"""What a model in a context needs in bytes, and the context and budget that fit a memory size. No weights are read.

The engine plans a context on a model without weights (`llama_model_params::no_alloc`), as llama.cpp's own
`common/fit.cpp` does, and says what K and V, compute buffers and eviction state would take. The process's share is
measured: what is resident when the vocabulary is loaded and nothing else.

Weights count once. That holds if the file is not mapped into memory: a mapping stays resident beside the copies that
the CPU backend makes of tensors whose rows it reorders (Q4_0, Q4_K, Q8_0, ...). Who loads what was chosen here says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from depthkv_edge import _log, _native
from depthkv_edge._native import llama_cpp
from depthkv_edge.budget import Auto, Budget, Fraction, FullCache
from depthkv_edge.errors import DepthKVError
from depthkv_edge.llama import default_flash_attn, file_budget, full_cache, load_without_weights
from depthkv_edge.memory import free_bytes, rss_bytes
from depthkv_edge.stats import read_stats
from depthkv_edge.units import mib

_api = llama_cpp.llama_cpp

LOWEST_BUDGET = 0.2  # the least that is chosen unasked: docs/calibration.md has no measurement below it
CONTEXTS = tuple(2**i for i in range(9, 24))  # 512 to 8 million tokens: what is tried where no context is given
UBATCHES = (512, 256, 128, 64, 32)

_BUDGETS = tuple(i / 100 for i in range(1, 101))
_AUTO_SHARE = 0.9  # of free memory: others want some too
_CELL_BYTES = 12, 160  # records of a cell: llama-kv-depth-cells.h, and llama_kv_cells with the nodes of its sets
_VOCAB_BYTES = 64  # per token: logits and the candidates of the sampler, in the engine and in the bindings
_RESERVE = 12 * 2**20  # graphs, threads, what the allocator cannot use


@dataclass(frozen=True)
class Shape:
    """What the size of a context depends on beside context, budget and ubatch. The defaults are those of `Llama`.

    Attributes:
        n_batch: most tokens of a batch.
        n_seq: sequences at the same time.
        unified: the sequences share all positions; otherwise each has its part.
        type_k, type_v: `enum ggml_type`; None: F16.
        flash_attn: `enum llama_flash_attn_type`; None: what `Llama` chooses.
        swa_full: sliding-window layers get as many cells as the others; None: what `Llama` chooses.
        scorer, rule: as in `Llama`.
    """

    n_batch: int = 512
    n_seq: int = 1
    unified: bool = False
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: int | None = None
    swa_full: bool | None = None
    scorer: str | None = None
    rule: str | None = None


AS_LLAMA = Shape()


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
    """

    weights: int
    kv: int
    compute: int
    scorer: int
    process: int
    reserve: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv + self.compute + self.scorer + self.process + self.reserve

    def to_dict(self) -> dict[str, int]:
        """The same for JSON."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Fit:
    """A context and a budget that fit.

    Attributes:
        n_ctx: positions.
        budget: share of the full cache, in (0, 1].
        n_ubatch: most tokens to compute at once; with a budget the engine takes fewer where layers are small.
        need: bytes of it.
        memory: bytes that there are.
        rows: what was chosen and why: a name, and what is to be said about it.
    """

    n_ctx: int
    budget: float
    n_ubatch: int
    need: Need
    memory: int
    rows: tuple[tuple[str, str], ...]


NeedOf = Callable[[int, float, int], Need]


@contextlib.contextmanager
def measuring(path: Path, shape: Shape = AS_LLAMA, process_bytes: int | None = None) -> Iterator[NeedOf]:
    """A function from context, budget in (0, 1] and ubatch to what they need.

    It raises a DepthKVError where the engine refuses: the budget is below the floor, say, or not defined for the model.

    Args:
        process_bytes: what the process takes without the model; None: what this one does now.

    Raises:
        DepthKVError: the model cannot be loaded.
    """
    with _model(path) as model:
        yield _need_of(model, shape, process_bytes)


def fit_memory(
    path: Path,
    memory: int,
    n_ctx: int | None = None,
    budget: Budget | None = None,
    *,
    n_ubatch: int = UBATCHES[0],
    shape: Shape = AS_LLAMA,
    lowest: float = LOWEST_BUDGET,
    process_bytes: int | None = None,
) -> Fit:
    """Choose context, ubatch and budget, in this order, such that everything together stays under a memory size.

    The full cache comes before a large ubatch, which is only faster; a slightly larger budget does not.

    Args:
        path: path of a GGUF.
        memory: bytes for the whole process.
        n_ctx: positions; it is kept. None: the largest power of two up to what the model was trained for that fits.
        budget: it is kept. None: the one in the file is kept, if there is one. Otherwise, and if Auto: the full cache,
            or the largest that fits, in steps of 0.01.
        n_ubatch: the most; smaller ones are tried where it does not fit.
        lowest: the least budget that may be chosen.
        process_bytes: as in `measuring`.

    Raises:
        DepthKVError: nothing fits: the message names the least memory that would do. Or the engine refuses the model.
    """
    with _model(path) as model:
        trained = int(_api.llama_model_n_ctx_train(model)) % 2**32
        given, origin = budget, "as given"
        if budget is None and (own := file_budget(model)) is not None:
            given, origin = Fraction(own), "as the model file says"
        need_of = _need_of(model, shape, process_bytes)
        return _Search(path, memory, given, origin, n_ubatch, lowest, shape, model, need_of, n_ctx, trained).run()


def free_memory() -> int:
    """Bytes that this process may take in all when it is to fit free memory."""
    return int(_AUTO_SHARE * free_bytes()) + rss_bytes()


def contexts_up_to(n_ctx: int) -> list[int]:
    """Contexts to choose from, the largest first: powers of two, and the one that the model was trained for."""
    return sorted({n for n in CONTEXTS if n < n_ctx} | {n_ctx}, reverse=True)


@dataclass(frozen=True)
class _Search:
    path: Path
    memory: int
    budget: Budget | None
    origin: str  # of a budget that is kept
    n_ubatch: int
    lowest: float
    shape: Shape
    model: Any
    need_of: NeedOf
    n_ctx: int | None
    trained: int

    def run(self) -> Fit:
        contexts = [self.n_ctx] if self.n_ctx else contexts_up_to(self.trained)
        least: tuple[int, float, int, Need] | None = None
        for n_ctx in contexts:
            budgets = self._budgets(n_ctx)
            n_bytes = self._kv_bytes(n_ctx, budgets[0])
            if n_bytes > self.memory and self.n_ctx:
                raise DepthKVError(self._far_too_little(n_ctx, budgets[0], n_bytes))
            if n_bytes > self.memory and n_ctx != contexts[-1]:
                continue  # not even planned: the records of its cells alone could be too much
            try:
                least = n_ctx, *self._least(n_ctx, budgets)
            except DepthKVError:
                if least is None:
                    raise
                break  # what would fit is below the floor of a layer
            if least[-1].total > self.memory:
                continue
            if budgets[-1] == 1.0:
                for n_ubatch in self._ubatches():
                    need = self.need_of(n_ctx, 1.0, n_ubatch)
                    if need.total <= self.memory:
                        return self._fit(n_ctx, n_ubatch, 1.0, need)
            for n_ubatch in self._ubatches():
                if found := self._largest(n_ctx, n_ubatch, budgets):
                    return self._fit(n_ctx, n_ubatch, *found)
        assert least is not None
        raise DepthKVError(self._too_little(*least))

    def _ubatches(self) -> list[int]:
        return [self.n_ubatch, *(n for n in UBATCHES if n < self.n_ubatch)]

    def _budgets(self, n_ctx: int) -> list[float]:
        if _native.llama_depthkv_layer_count(self.model) < 0:
            if self.budget is None:
                return [1.0]
            raise DepthKVError(f"{self.path}: {_native.last_error()}")
        if self.budget is None or isinstance(self.budget, Auto):
            return [share for share in _BUDGETS if share >= self.lowest]
        if isinstance(self.budget, Fraction):
            return [self.budget.value]
        return [self.budget.resolve(self._full_cache(n_ctx))]

    def _full_cache(self, n_ctx: int) -> FullCache:
        shape = self.shape
        arguments = {"n_ctx": n_ctx, "n_batch": shape.n_batch, "n_ubatch": self.n_ubatch, "swa_full": shape.swa_full}
        return full_cache(self.model, arguments | {"type_k": shape.type_k, "type_v": shape.type_v})

    def _kv_bytes(self, n_ctx: int, budget: float) -> int:
        """About the least that K and V take, without a plan; 0 where no budget is defined."""
        if _native.llama_depthkv_layer_count(self.model) < 0:
            return 0
        return int(0.9 * budget * self._full_cache(n_ctx).bytes_growing)

    def _least(self, n_ctx: int, budgets: list[float]) -> tuple[float, int, Need]:
        """The least that the engine accepts: budget, ubatch and what they need."""
        n_ubatch = self._ubatches()[-1]
        low, high = 0, len(budgets) - 1
        while low < high:
            middle = (low + high) // 2
            try:
                self.need_of(n_ctx, budgets[middle], n_ubatch)
                high = middle
            except DepthKVError:  # below the floor of a layer
                low = middle + 1
        try:
            return budgets[low], n_ubatch, self.need_of(n_ctx, budgets[low], n_ubatch)
        except DepthKVError as error:
            raise DepthKVError(f"{self.path}: {error}") from None

    def _largest(self, n_ctx: int, n_ubatch: int, budgets: list[float]) -> tuple[float, Need] | None:
        best = None
        low, high = 0, len(budgets) - 1
        while low <= high:
            middle = (low + high) // 2
            try:
                need = self.need_of(n_ctx, budgets[middle], n_ubatch)
            except DepthKVError:  # below the floor of a layer
                low = middle + 1
                continue
            if need.total <= self.memory:
                best = budgets[middle], need
                low = middle + 1
            else:
                high = middle - 1
        return best

    def _fit(self, n_ctx: int, n_ubatch: int, budget: float, need: Need) -> Fit:
        context = "as given"
        if not self.n_ctx:
            larger = [n for n in contexts_up_to(self.trained) if n > n_ctx]
            context = f"the largest that fits: {larger[-1]} would not" if larger else "what the model was trained for"
        share = "the largest that fits"
        if budget == 1.0:
            share = "the full cache fits"
        elif n_ubatch > UBATCHES[-1]:
            share += f" with a ubatch of {n_ubatch}"
        if self.budget is not None and not isinstance(self.budget, Auto):
            share = self.origin
        rows = [
            ("memory", f"{mib(need.total)} of {mib(self.memory)} MiB: {_parts(need)}"),
            ("context", f"{n_ctx} tokens, {context}"),
            ("budget", f"{budget:.3g} of the full KV cache, {share}"),
        ]
        if n_ubatch < self.n_ubatch:
            rows.append(("ubatch", f"{n_ubatch} tokens: more would not fit"))
        return Fit(n_ctx, budget, n_ubatch, need, self.memory, tuple(rows))

    def _far_too_little(self, n_ctx: int, budget: float, n_bytes: int) -> str:
        return (
            f"{mib(self.memory)} MiB is too little memory for {self.path.name} at a context of {n_ctx} tokens: K and "
            f"V alone take {mib(n_bytes)} MiB with a budget of {budget:.3g}; give more, or a smaller context"
        )

    def _too_little(self, n_ctx: int, budget: float, n_ubatch: int, need: Need) -> str:
        least = f"{-(-need.total // 2**20)}MiB"
        ways = f"give {least} or more"
        if self.n_ctx:
            ways += ", or a smaller context"
        return (
            f"{mib(self.memory)} MiB is too little memory for {self.path.name} at a context of {n_ctx} tokens: the "
            f"least that would do is {least}, with a budget of {budget:.3g} and a ubatch of {n_ubatch} ({_parts(need)}"
            f" MiB); {ways}"
        )


@contextlib.contextmanager
def _model(path: Path) -> Iterator[Any]:
    _native.clear_error()
    with _log.capture_errors(verbose=False) as lines, contextlib.ExitStack() as stack:
        try:
            model = stack.enter_context(load_without_weights(str(path)))
        except ValueError as error:
            raise DepthKVError(f"{path}: {_native.last_error() or _log.reason(lines) or error}") from error
        yield model


def _need_of(model: Any, shape: Shape, process_bytes: int | None) -> NeedOf:
    process = rss_bytes() if process_bytes is None else process_bytes
    n_vocab = _api.llama_vocab_n_tokens(_api.llama_model_get_vocab(model))

    def need_of(n_ctx: int, budget: float, n_ubatch: int) -> Need:
        with _context(model, shape, n_ctx, budget, n_ubatch) as context:
            kv = read_stats(context, budget)
        n_cells = sum(layer.cells for layer in kv.layers) if kv.active else n_ctx
        return Need(
            weights=int(_api.llama_model_size(model)),
            kv=kv.bytes,
            compute=kv.bytes_compute + kv.bytes_work,
            scorer=kv.bytes_scorer,
            process=process,
            reserve=_RESERVE + _VOCAB_BYTES * n_vocab + _CELL_BYTES[not kv.active] * n_cells * shape.n_seq,
        )

    return need_of


@contextlib.contextmanager
def _context(model: Any, shape: Shape, n_ctx: int, budget: float, n_ubatch: int) -> Iterator[Any]:
    params = _api.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = min(n_ctx, shape.n_batch)
    params.n_ubatch = min(params.n_batch, n_ubatch)
    params.n_seq_max, params.kv_unified = shape.n_seq, shape.unified
    # logits are reserved for every token of a ubatch, and used, that is resident, for the last one of a sequence
    params.n_outputs_max = shape.n_seq
    for name in ("type_k", "type_v", "swa_full"):
        if getattr(shape, name) is not None:
            setattr(params, name, getattr(shape, name))
    if shape.swa_full is None and budget < 1.0:
        params.swa_full = False
    params.flash_attn_type = default_flash_attn(budget, params.type_v) if shape.flash_attn is None else shape.flash_attn
    depth = _native.llama_depthkv_default_params()
    depth.budget = budget
    depth.scorer = shape.scorer.encode() if shape.scorer else None
    depth.rule = shape.rule.encode() if shape.rule else None
    context = _native.llama_depthkv_init_from_model(model, params, depth)
    if not context:
        raise DepthKVError(_native.last_error() or "the engine cannot create a context")
    try:
        yield context
    finally:
        _api.llama_free(context)


def _parts(need: Need) -> str:
    names = {"kv": "KV cache", "scorer": "eviction"}
    return ", ".join(f"{names.get(name, name)} {mib(n_bytes)}" for name, n_bytes in asdict(need).items())
