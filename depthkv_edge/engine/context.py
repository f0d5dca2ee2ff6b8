"""The one way to plan and to open a context of the engine: what it is made with, what it would be, and a live one."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depthkv_edge.engine import capi, log
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.devices import ON_CPU, Offload
from depthkv_edge.engine.stats import KVStats, from_raw
from depthkv_edge.errors import DepthKVError

_api = llama_cpp.llama_cpp

KEY_BUDGET = "depthkv.budget"
F16 = _api.GGML_TYPE_F16
_FLOATS = (_api.GGML_TYPE_F32, _api.GGML_TYPE_F16, 30)  # 30: GGML_TYPE_BF16, absent from the bindings
_MOST_LAYERS = 1024
AUTO, OFF, ON = -1, 0, 1  # enum llama_flash_attn_type


@dataclass(frozen=True)
class Options:
    """What a context is made with. The defaults are those of `Llama`.

    Attributes:
        n_ctx: positions; 0 for what the model was trained for.
        n_batch: most tokens of a batch.
        n_ubatch: most tokens to compute at once; with a budget the engine takes fewer where layers are small.
        n_seq: sequences at the same time.
        unified: the sequences share all positions; otherwise each has its part.
        type_k, type_v: `enum ggml_type`.
        flash_attn: AUTO, OFF or ON; None: what `Llama` chooses.
        swa_full: without a budget, sliding-window layers get as many cells as the others; None: what `Llama` chooses.
        n_threads: CPU threads; None: the engine's default.
        n_outputs: most tokens of a batch whose logits are wanted; 0: all of them.
        offload_kqv: the cells of layers on a GPU are there, too.
        budget: as users write it; None: the model's own, or the full cache.
        scorer, rule: None: the model's own.
        cells: of each layer that grows with the context, instead of a budget.
    """

    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    n_seq: int = 1
    unified: bool = False
    type_k: int = F16
    type_v: int = F16
    flash_attn: int | None = None
    swa_full: bool | None = None
    n_threads: int | None = None
    n_outputs: int = 0
    offload_kqv: bool = True
    budget: str | None = None
    scorer: str | None = None
    rule: str | None = None
    cells: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """What a context would be.

    Attributes:
        kv: its statistics when it is empty. Without weights in the model they are complete, with them there are no
            buffers.
        fits: False: it takes more than the memory that there is, or than a device has, and `kv` is of the least that
            would do; where no memory was given, of what was asked for.
        reason: why it does not fit.
    """

    kv: KVStats
    fits: bool
    reason: str = ""


@contextlib.contextmanager
def load_without_weights(path: Path | str, offload: Offload = ON_CPU) -> Iterator[Any]:
    """A `llama_model` with its metadata and the shapes of its tensors only.

    Args:
        offload: where its layers would be.

    Raises:
        DepthKVError: it cannot be loaded.
    """
    params = _api.llama_model_default_params()
    _keep = offload.apply(params)
    params.no_alloc = True
    params.load_mode = _api.LLAMA_LOAD_MODE_NONE
    capi.llama_depthkv_clear_error()
    with log.capture_errors(verbose=False) as lines:  # for as long as the model is used: contexts log too
        model = _api.llama_model_load_from_file(str(path).encode(), params)
        if model is None:
            raise DepthKVError(f"{path}: {log.reason(lines, path) or 'cannot be loaded'}")
        try:
            yield model
        finally:
            _api.llama_model_free(model)


def trained_ctx(model: Any) -> int:
    """Positions that a `llama_model` was trained for. The file's number has no sign, the API's has one."""
    return int(_api.llama_model_n_ctx_train(model)) % 2**32


def has_budget(model: Any) -> bool:
    """Whether the file of a `llama_model` has a budget. It is for the engine to read it."""
    return _api.llama_model_meta_val_str(model, KEY_BUDGET.encode(), None, 0) >= 0


def is_quantised(ggml_type: int) -> bool:
    return ggml_type not in _FLOATS


def flash_attn_type(written: bool | None) -> int | None:
    """What `Options` has for what `Llama` has."""
    return None if written is None else ON if written else OFF


def default_flash_attn(active: bool, type_v: int) -> int:
    """What `Llama` chooses: the engine knows what is fastest with a budget, and a quantised V cannot do without."""
    return AUTO if active or is_quantised(type_v) else OFF


def plan_params(model: Any, params: Any, depth: Any) -> Plan:
    """What a context with these `llama_context_params` and `llama_depthkv_params` would be.

    Raises:
        DepthKVError: the engine refuses it.
    """
    raw, layers = capi.llama_depthkv_stats(), (capi.llama_depthkv_layer * _MOST_LAYERS)()
    status = capi.llama_depthkv_plan(model, params, depth, raw, layers, _MOST_LAYERS)
    if status < 0:
        raise DepthKVError(capi.last_error() or "the engine cannot plan a context")
    return Plan(from_raw(raw, layers), status == 0, capi.last_error() if status else "")


def plan_context(model: Any, options: Options, memory: int = 0) -> Plan:
    """What a context would be.

    Args:
        model: a `llama_model`, without weights if the plan is to be complete.
        memory: bytes that weights, cells and buffers have to fit: a smaller ubatch, and with the budget `auto` a
            smaller budget, are chosen where it is too little. 0: no limit.

    Raises:
        DepthKVError: the engine refuses it.
    """
    flash_attn = options.flash_attn
    if flash_attn is None:
        flash_attn = default_flash_attn(True, options.type_v)
    plan = _plan(model, replace(options, flash_attn=flash_attn), memory)
    if plan.kv.active or options.flash_attn is not None or flash_attn == default_flash_attn(False, options.type_v):
        return plan
    full = _plan(model, replace(options, flash_attn=OFF, budget="1"), memory)
    if full.fits or options.budget != "auto":
        return full
    # it fits with flash attention only, which `Llama` is without: less of it, then
    parts = (_plan(model, replace(options, flash_attn=AUTO, budget=f"{i}%"), memory) for i in range(99, 0, -1))
    return next((part for part in parts if part.fits), full)


def _plan(model: Any, options: Options, memory: int) -> Plan:
    depth, _keep = _depth_params(options)
    depth.memory = memory
    return plan_params(model, _context_params(options), depth)


@contextlib.contextmanager
def open_context(model: Any, options: Options) -> Iterator[Any]:
    """A `llama_context`. On a model without weights its memory is counted, and not allocated.

    Raises:
        DepthKVError: the engine refuses it.
    """
    depth, _keep = _depth_params(options)
    with log.capture_errors(False) as lines:
        context = capi.llama_depthkv_init_from_model(model, _context_params(options), depth)
    if not context:
        raise DepthKVError(log.reason(lines) or "the engine cannot create a context")
    try:
        yield context
    finally:
        _api.llama_free(context)


def _context_params(options: Options) -> Any:
    params = _api.llama_context_default_params()
    params.n_ctx = options.n_ctx
    params.n_batch = min(options.n_ctx or options.n_batch, options.n_batch)
    params.n_ubatch = min(params.n_batch, options.n_ubatch)
    params.n_seq_max, params.kv_unified = options.n_seq, options.unified
    params.type_k, params.type_v = options.type_k, options.type_v
    params.n_outputs_max = options.n_outputs
    params.offload_kqv = options.offload_kqv
    if options.flash_attn is not None:
        params.flash_attn_type = options.flash_attn
    if options.swa_full is not None:
        params.swa_full = options.swa_full
    if options.n_threads is not None:
        params.n_threads = params.n_threads_batch = options.n_threads
    return params


def _depth_params(options: Options) -> tuple[Any, Any]:
    """`llama_depthkv_params`, and what has to live as long."""
    depth = capi.llama_depthkv_default_params()
    for name in ("budget", "scorer", "rule"):
        value = getattr(options, name)
        setattr(depth, name, None if value is None else value.encode())
    if options.cells is None:
        return depth, None
    depth.n_layers = len(options.cells)
    cells = (ctypes.c_uint32 * depth.n_layers)(*options.cells)
    depth.cells = ctypes.cast(cells, ctypes.POINTER(ctypes.c_uint32))
    return depth, cells
