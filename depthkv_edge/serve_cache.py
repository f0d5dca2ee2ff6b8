"""The KV cache that llama-server will allocate, planned by the engine before the server starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from depthkv_edge import _log, _native
from depthkv_edge._native import llama_cpp
from depthkv_edge.budget import Auto, Budget, Bytes
from depthkv_edge.errors import DepthKVError
from depthkv_edge.fit import Fit, Shape, fit_memory, free_memory
from depthkv_edge.llama import file_budget, load_without_weights, resolve_budget
from depthkv_edge.stats import KVStats, read_stats

_api = llama_cpp.llama_cpp

FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type

# Resident in a server beside weights, K and V and buffers: libraries and threads, and for each conversation its tokens
# and its sampler. Twice what SmolLM2 took: 13 to 20 MiB with one conversation, 26 with four.
_PROCESS_BYTES, _SLOT_BYTES = 24 * 2**20, 4 * 2**20


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of all conversations.

    Attributes:
        active: False where the stock, full cache runs.
        unified: every conversation may use all positions, and has its part of the cells; otherwise of both.
        budget: share of the full cache, in (0, 1]: what was asked for, the model's own, or 1.
        n_ctx: positions of the context, as the server is told.
        n_ctx_seq: positions of one conversation.
        n_ubatch: most tokens to compute at once; with a budget the engine takes fewer where layers are small.
        bytes: K and V of all conversations.
        bytes_full: the same for the full cache.
        cells: cells of one conversation in a layer, on average.
        n_seq: conversations.
        rows: what was chosen to fit the memory, and why: a name, and what is to be said about it.
    """

    active: bool
    unified: bool
    budget: float
    n_ctx: int
    n_ctx_seq: int
    n_ubatch: int
    bytes: int
    bytes_full: int
    cells: int
    n_seq: int
    rows: tuple[tuple[str, str], ...] = ()


def ggml_type(name: str) -> int:
    """`enum ggml_type` of a type as it is written on a command line.

    Raises:
        DepthKVError: there is no such type.
    """
    try:
        return int(GGMLQuantizationType[name.upper()])
    except KeyError:
        raise DepthKVError(f"cache type {name} is not known: give f32, f16, bf16, q8_0 or q4_0") from None


def plan_cache(
    model: Path, budget: Budget | None, n_ctx: int | None, n_ubatch: int, shape: Shape, memory: int | None = None
) -> CachePlan:
    """Have the engine plan a server's KV cache. No weights are read, no K and V allocated.

    Args:
        budget: None for the model's own, or the full cache.
        n_ctx: positions; None for what the model was trained for, or what fits the memory.
        n_ubatch: most tokens to compute at once.
        memory: bytes for the server as a whole; None: no limit.

    Raises:
        DepthKVError: the file is damaged, the engine refuses the model, the budget or the context, or nothing fits.
    """
    _native.clear_error()
    with _log.capture_errors(verbose=False) as lines:
        try:
            if memory is None and isinstance(budget, Auto):
                memory = free_memory()
            if memory is None:
                return _plan(model, budget, n_ctx, n_ubatch, shape)
            process = _PROCESS_BYTES + _SLOT_BYTES * shape.n_seq
            fit = fit_memory(model, memory, n_ctx, budget, n_ubatch=n_ubatch, shape=shape, process_bytes=process)
            return _plan_fitting(model, fit, shape)
        except DepthKVError as error:
            raise _refusal(model, str(error), shape) from None
        except ValueError as error:
            raise _refusal(model, _native.last_error() or _log.reason(lines) or str(error), shape) from error


def _refusal(path: Path, why: str, shape: Shape) -> DepthKVError:
    hint = ", or lower --parallel" if shape.n_seq > 1 and "below the floor" in why else ""
    return DepthKVError(f"{path}: {why.removeprefix(f'{path}: ')}{hint}")


def _plan_fitting(path: Path, fit: Fit, shape: Shape) -> CachePlan:
    with load_without_weights(str(path)) as model:
        stats, n_ctx_seq = _stats(model, shape, fit.n_ctx, fit.n_ubatch, fit.budget)
        _check_trained(model, fit.n_ctx, n_ctx_seq)
    return replace(_cache(stats, fit.budget, fit.n_ctx, n_ctx_seq, fit.n_ubatch, shape), rows=fit.rows)


def _plan(path: Path, budget: Budget | None, n_ctx: int | None, n_ubatch: int, shape: Shape) -> CachePlan:
    with load_without_weights(str(path)) as model:
        n_ctx = n_ctx or int(_api.llama_model_n_ctx_train(model))
        arguments = {"n_ctx": n_ctx, "n_batch": shape.n_batch, "n_ubatch": n_ubatch, "swa_full": shape.swa_full}
        arguments |= {"type_k": shape.type_k, "type_v": shape.type_v}
        share = file_budget(model) or 1.0
        if budget is not None:
            share = resolve_budget(budget, str(path), arguments)
        stats, n_ctx_seq = _stats(model, shape, n_ctx, n_ubatch, share)
        if isinstance(budget, Bytes) and stats.bytes > budget.value:
            # every conversation has sliding windows of its own, which the share above counts once
            share = resolve_budget(Bytes(2 * budget.value - stats.bytes), str(path), arguments)
            stats, n_ctx_seq = _stats(model, shape, n_ctx, n_ubatch, share)
        _check_trained(model, n_ctx, n_ctx_seq)
    return _cache(stats, share, n_ctx, n_ctx_seq, n_ubatch, shape)


def _check_trained(model: Any, n_ctx: int, n_ctx_seq: int) -> None:
    n_trained = int(_api.llama_model_n_ctx_train(model))
    if n_ctx_seq > n_trained:
        raise DepthKVError(
            f"-c {n_ctx} is more than the {n_trained} tokens that the model was trained for, and llama-server gives a "
            f"conversation no more than these: give -c {n_trained} or less"
        )


def _cache(stats: KVStats, share: float, n_ctx: int, n_ctx_seq: int, n_ubatch: int, shape: Shape) -> CachePlan:
    return CachePlan(
        active=stats.active,
        unified=shape.unified,
        budget=share,
        n_ctx=n_ctx,
        n_ctx_seq=n_ctx_seq,
        n_ubatch=n_ubatch,
        bytes=stats.bytes,
        bytes_full=stats.bytes_full,
        cells=sum(layer.cells for layer in stats.layers) // max(1, len(stats.layers)),
        n_seq=shape.n_seq,
    )


def _stats(model: Any, shape: Shape, n_ctx: int, n_ubatch: int, budget: float) -> tuple[KVStats, int]:
    """Of an empty context, and the positions of one conversation in it."""
    params = _api.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch, params.n_ubatch = shape.n_batch, n_ubatch
    params.n_seq_max, params.kv_unified = shape.n_seq, shape.unified
    for name in ("type_k", "type_v", "swa_full"):
        if getattr(shape, name) is not None:
            setattr(params, name, getattr(shape, name))
    if shape.flash_attn is not None:
        params.flash_attn_type = shape.flash_attn
    depth = _native.llama_depthkv_default_params()
    depth.budget = budget
    ctx = _native.llama_depthkv_init_from_model(model, params, depth)
    if not ctx:
        raise ValueError("the engine cannot create a context")
    try:
        n_ctx_seq = int(_api.llama_n_ctx(ctx)) // (1 if shape.unified else shape.n_seq)
        return read_stats(ctx, budget), n_ctx_seq
    finally:
        _api.llama_free(ctx)
