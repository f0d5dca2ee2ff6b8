"""The KV cache that llama-server will allocate, planned by the engine before the server starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from depthkv_edge.engine.budget import Budget
from depthkv_edge.engine.context import AUTO, OFF, ON, Options, load_without_weights, plan_context, trained_ctx
from depthkv_edge.engine.devices import EVERYWHERE, Offload
from depthkv_edge.engine.stats import KVStats
from depthkv_edge.errors import DepthKVError
from depthkv_edge.sizing.fit import fit_memory, free_memory

FLASH_ATTN = {"auto": AUTO, "off": OFF, "on": ON}

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
        kv_budget: the same as the server is told.
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
    kv_budget: str
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
    model: Path,
    budget: Budget | None,
    options: Options,
    memory: int | None = None,
    offload: Offload = EVERYWHERE,
) -> CachePlan:
    """Have the engine plan a server's KV cache. No weights are read, no K and V allocated.

    Args:
        budget: None for the model's own, or the full cache.
        options: of the context, but for the budget; `n_ctx` 0 for what the model was trained for, or what fits memory.
        memory: bytes for the server as a whole; None: no limit.
        offload: where the model's layers will be.

    Raises:
        DepthKVError: the file is damaged, the engine refuses the model, the budget or the context, or nothing fits.
    """
    try:
        if memory is None and budget is not None and budget.is_auto:
            memory = free_memory()
        if memory is None:
            return _plan(model, budget, options, offload)
        process = _PROCESS_BYTES + _SLOT_BYTES * options.n_seq
        fit = fit_memory(
            model, memory, options.n_ctx or None, budget, options=options, process_bytes=process, offload=offload
        )
        with load_without_weights(model) as loaded:
            _check_trained(loaded, fit.n_ctx, fit.kv)
        fitted = replace(options, n_ctx=fit.n_ctx, n_ubatch=fit.n_ubatch)
        return replace(_cache(fit.kv, fit.kv_budget, fitted), rows=fit.rows)
    except DepthKVError as error:
        why = str(error).removeprefix(f"{model}: ")
        hint = ", or lower --parallel" if options.n_seq > 1 and "below the floor" in why else ""
        raise DepthKVError(f"{model}: {why}{hint}") from None


def _plan(path: Path, budget: Budget | None, options: Options, offload: Offload) -> CachePlan:
    with load_without_weights(path, offload) as model:
        text = None if budget is None else budget.text
        asked = replace(options, n_ctx=options.n_ctx or trained_ctx(model), budget=text)
        kv = plan_context(model, asked).kv
        _check_trained(model, asked.n_ctx, kv)
    return _cache(kv, text or str(kv.budget), asked)


def _check_trained(model: Any, n_ctx: int, kv: KVStats) -> None:
    n_trained = trained_ctx(model)
    if kv.n_ctx_seq > n_trained:
        raise DepthKVError(
            f"-c {n_ctx} is more than the {n_trained} tokens that the model was trained for, and llama-server gives a "
            f"conversation no more than these: give -c {n_trained} or less"
        )


def _cache(kv: KVStats, kv_budget: str, options: Options) -> CachePlan:
    return CachePlan(
        active=kv.active,
        unified=options.unified,
        budget=kv.budget,
        kv_budget=kv_budget,
        n_ctx=options.n_ctx,
        n_ctx_seq=kv.n_ctx_seq,
        n_ubatch=options.n_ubatch,
        bytes=kv.bytes,
        bytes_full=kv.bytes_full,
        cells=sum(layer.cells for layer in kv.layers) // max(1, len(kv.layers)),
        n_seq=options.n_seq,
    )
