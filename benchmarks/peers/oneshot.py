"""Ours in kvpress's regime: the prompt is read whole, each layer evicts once, then the cache grows.

In torch, by the engine's own code (engine/sim.py) with the same scorer. Not faithful to the engine, which never holds
the whole prompt: here every query has seen all of it. One full cache is kept, and what a layer has lost is masked; the
cells reported are those of a layer that evicts right after its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.peers.plan import FULL, ONCE, Item, Plan, Window, one_pass_cells, record_key
from benchmarks.peers.score import ask, score_tail
from depthkv_edge.calibrate.attention import AttentionCall, attend, attention_weights, observe
from depthkv_edge.calibrate.scorers import mass_of
from depthkv_edge.calibrate.target import Target
from depthkv_edge.calibrate.window import copy_cache
from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import N_CELLS_MIN, N_QUERY_SPAN, N_WARMUP
from depthkv_edge.engine.sim import LayerSim
from depthkv_edge.measure.progress import LongWork
from depthkv_edge.modelfile.keys import Calibration
from depthkv_edge.quality.store import Record, Store

METHODS = ("depth", "uniform", "streaming")
ATTENTION, STREAMING = "attention", "streaming"

_CHUNK = 512  # tokens of one forward pass of the prompt: bounds the activations


@dataclass(frozen=True)
class Judged:
    """What the queries of a prompt say of the cells of a layer.

    Attributes:
        layer: layer index in the model.
        passes: tokens that come, and what the queries that are then pending make of all so far; None if none are.
    """

    layer: int
    passes: tuple[tuple[int, np.ndarray | None], ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt in a full cache.

    Attributes:
        judged: of each layer.
        cache: copies of it are run on, it stays as it is.
    """

    target: Target
    n_tokens: int
    judged: tuple[Judged, ...]
    cache: DynamicCache


def read_prompt(target: Target, tokens: Sequence[int]) -> Prompt:
    """Run a prompt, and have its cells judged by the queries that the engine would sample from its end.

    The engine counts the attention of N_WARMUP tokens before a layer evicts for the first time, in steps of
    N_QUERY_SPAN tokens of which a few are sampled.
    """
    ids = torch.tensor([list(tokens)], device=target.device)
    n_tokens = len(tokens)
    judging = max(0, n_tokens - N_WARMUP - N_QUERY_SPAN)  # start of the pass that holds every sampled query
    judged: dict[int, Judged] = {}

    def judge(call: AttentionCall) -> torch.Tensor:
        judged[call.layer] = judge_cells(call)
        return attend(call)

    cache = target.new_cache()
    with torch.no_grad():
        for at in range(0, judging, _CHUNK):
            with observe(attend):
                target.hidden(ids[:, at : min(at + _CHUNK, judging)], cache)
        with observe(judge):
            target.hidden(ids[:, judging:], cache)
    return Prompt(target, n_tokens, tuple(judged[layer] for layer in target.layer_ids), cache)


def judge_cells(call: AttentionCall) -> Judged:
    """What the queries of the last tokens say of the cells of a layer.

    Args:
        call: of the last tokens of a prompt, at least N_WARMUP + N_QUERY_SPAN of them or all.
    """
    n_tokens, n_queries = call.key.shape[2], call.query.shape[2]
    first = n_tokens - n_queries
    ends = [end for end in range(n_tokens, 0, -N_QUERY_SPAN) if end >= n_tokens - N_WARMUP and end > first][::-1]
    sim = LayerSim(ATTENTION, call.layer, n_tokens)
    start = max(first, ends[0] - N_QUERY_SPAN)
    sim.add(start)
    passes: list[tuple[int, np.ndarray | None]] = [(start, None)]
    for end in ends:
        sim.add(end - start)
        queries = sim.pending()
        mass = _attention_mass(call, torch.from_numpy(queries - first), queries)[:end]
        sim.count(mass)
        passes.append((end - start, mass))
        start = end
    return Judged(call.layer, tuple(passes))


def _attention_mass(call: AttentionCall, rows: torch.Tensor, queries: np.ndarray) -> np.ndarray:
    """Float32 [n_tokens] that the scorer makes of what some queries give to each cell.

    Args:
        rows: of the queries in the call.
        queries: their positions.
    """
    n_heads, n_heads_kv, n_tokens = call.query.shape[1], call.key.shape[1], call.key.shape[2]
    n_group = n_heads // n_heads_kv
    device = call.key.device
    mask = torch.arange(n_tokens, device=device)[None] <= torch.from_numpy(queries).to(device)[:, None]
    key = call.key[0].repeat_interleave(n_group, dim=0)
    weights = attention_weights(call.query[0][:, rows.to(device)], key, mask, call)
    return mass_of(ATTENTION)(weights.reshape(n_heads_kv, -1, n_tokens), call.value[0].float()).cpu().numpy()


def keep(prompt: Prompt, scorer: str, n_cells: Sequence[int]) -> list[np.ndarray]:
    """Positions, ascending, that each layer keeps when it evicts down to so many cells at once."""
    kept = []
    for judged, n in zip(prompt.judged, n_cells, strict=True):
        sim = LayerSim(scorer, judged.layer, prompt.n_tokens)
        for n_new, mass in judged.passes:
            sim.add(n_new)
            if mass is not None:
                sim.count(mass)
        sim.evict(prompt.n_tokens - n)
        kept.append(sim.pos)
    return kept


def predict(prompt: Prompt, kept: Sequence[np.ndarray], tokens: Sequence[int]) -> torch.Tensor:
    """Logits [n, n_vocab] of what follows each token after a prompt, of which each layer holds some positions."""
    target = prompt.target
    held = dict(zip(target.layer_ids, kept, strict=True))

    def observer(call: AttentionCall) -> torch.Tensor:
        if len(held[call.layer]) == prompt.n_tokens:
            return attend(call)
        mask = torch.zeros_like(call.mask)
        mask[..., torch.from_numpy(held[call.layer])] = True
        mask[..., prompt.n_tokens :] = True
        return attend(call, mask & call.mask)

    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.no_grad(), observe(observer):
        return target.logits(target.hidden(ids, copy_cache(prompt.cache)))


def allocate(calibration: Calibration, method: str, ratio: float, n_prompt: int) -> list[int]:
    """Cells of every layer, by the engine's allocator: in all what kvpress keeps, which rounds a layer's down.

    Raises:
        DepthKVError: the ratio is below what a layer needs.
    """
    curves = {"keep_ratios": calibration.keep_ratios, "sensitivity": calibration.sensitivity}
    rule = {"rule": calibration.rule or None} | curves if method == "depth" else {"rule": "uniform"}
    return capi.alloc(
        int(n_prompt * ratio) / n_prompt, len(calibration.layer_ids), n_prompt, n_floor=N_CELLS_MIN, **rule
    )


def measure(target: Target, calibration: Calibration, plan: Plan, store: Store) -> None:
    """Everything that is not in the store yet."""
    todo = plan.missing(store, ONCE, METHODS)
    with LongWork() as watcher:
        watcher.begin(sum(item.n_prompt + (1 + len(missing)) * item.n_after for item, missing in todo))
        for item, missing in todo:
            watcher.title(f"ours, evicting once: {item.text}")
            prompt = read_prompt(target, item.prompt)
            watcher.advance(item.n_prompt)
            everything = keep(prompt, ATTENTION, [item.n_prompt] * len(prompt.judged))
            reference = predict(prompt, everything, item.tail) if isinstance(item, Window) else None
            for method, ratio in [(FULL, 1.0), *missing]:
                kept = everything
                if method != FULL:
                    scorer = STREAMING if method == "streaming" else ATTENTION
                    kept = keep(prompt, scorer, allocate(calibration, method, ratio, item.n_prompt))
                store[record_key(item, ONCE, method, ratio)] = _record(prompt, kept, item, reference)
                watcher.advance(item.n_after)


def _record(prompt: Prompt, kept: list[np.ndarray], item: Item, reference: torch.Tensor | None) -> Record:
    cells = {"cells": one_pass_cells([len(pos) for pos in kept], item.n_prompt, item.n_tail)}
    if isinstance(item, Window):
        return cells | score_tail(reference, predict(prompt, kept, item.tail), item.tail)
    return cells | ask(item, lambda tokens: predict(prompt, kept, tokens))
