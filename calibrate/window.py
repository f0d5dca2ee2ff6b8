"""One window of text through the model: what every measurement of it shares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from depthkv_edge.calibrate.attention import AttentionCall, attend, attention_weights, observe
from depthkv_edge.calibrate.divergence import mean_divergence
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.scorers import Mass, mass_of
from depthkv_edge.calibrate.target import Target, layer_inputs
from depthkv_edge.engine.rules import SCORERS
from depthkv_edge.engine.sim import AttentionOf, Held, sampled_queries, simulate

_PREFILL_CHUNK = 512  # tokens of one forward pass: bounds the activations
_HEAD_CHUNK = 128  # rows of logits that exist at once


@dataclass(frozen=True)
class Prefilled:
    """A window whose first tokens are in full caches; its tail is still to be run.

    Attributes:
        target: the model.
        tail: int64 [1, n_tail] tokens over which divergence is measured.
        n_past: tokens before the tail.
        cache: KV cache of the tokens before the tail; copies of it are run on, it stays as it is.
        scorer: name of the token-scoring rule that chooses what is evicted.
        plans: how many cells there are.
        asked: positions of the tokens over whose prediction divergence is measured; none for all of the tail.
    """

    target: Target
    tail: torch.Tensor
    n_past: int
    cache: DynamicCache
    scorer: str
    plans: Sequence[LayerCells]
    samples: _QuerySamples
    asked: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return self.n_past + self.tail.shape[1]

    def predictions(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that count, of those [n_tail, n_embd] of the tail: each predicts the token after it."""
        return hidden[[at - 1 - self.n_past for at in self.asked]] if self.asked else hidden

    def simulate(self, call: AttentionCall) -> list[list[Held] | None]:
        """For each plan, the cells that a layer holds at each ubatch that touches the tail; None if nothing is evicted.

        Args:
            call: of the whole tail, with full caches. Eviction sees clean queries, keys and values then, as if only
                this layer were pruned.
        """
        if call.layer not in self.target.layer_ids:
            return [None] * len(self.plans)
        i = self.target.layer_ids.index(call.layer)
        attention_of = _attention_of(call, self.samples.of(call, self.n_past), mass_of(self.scorer))
        return [
            simulate(self.scorer, call.layer, self.n_tokens, plan.cells[i], plan.n_ubatch, attention_of, self.n_past)
            if plan.cells[i] < self.n_tokens
            else None
            for plan in self.plans
        ]

    def keep_mask(self, held: list[Held], device: torch.device) -> torch.Tensor:
        """bool [1, 1, n_tail, n_tokens]: true where the layer still holds what the query may see."""
        keep = np.zeros((self.tail.shape[1], self.n_tokens), bool)
        for i, ubatch in enumerate(held):
            end = held[i + 1].start if i + 1 < len(held) else self.n_tokens
            rows = keep[max(ubatch.start - self.n_past, 0) : end - self.n_past]
            rows[:, ubatch.pos] = True
            rows[:, ubatch.start : end] = True
        keep &= np.tri(*keep.shape, self.n_past, bool)
        return torch.from_numpy(keep)[None, None].to(device)


@dataclass(frozen=True)
class Window:
    """A window whose tail has run once with full caches.

    Attributes:
        prefilled: the window before that.
        inputs: hidden states [1, n_tail, n_embd] that enter each layer.
        reference: logits [n, n_vocab] of the full cache, of the predictions that count.
        held: by layer index, for each plan: see `Prefilled.simulate`.
    """

    prefilled: Prefilled
    inputs: list[torch.Tensor]
    reference: torch.Tensor
    held: dict[int, list[list[Held] | None]]

    def rerun(self, plans: Mapping[int, int]) -> float:
        """Mean KL divergence of the tail from the full cache, nats per token, with some layers pruned.

        The layers below the first of them are not run again.

        Args:
            plans: index of a plan, by index of the layer that is pruned by it.
        """
        held = {layer: self.held[layer][plan] for layer, plan in plans.items()}
        held = {layer: cells for layer, cells in held.items() if cells is not None}
        if not held:
            return 0.0

        def observer(call: AttentionCall) -> torch.Tensor:
            cells = held.get(call.layer)
            return attend(call, None if cells is None else self.prefilled.keep_mask(cells, call.query.device))

        target, first = self.prefilled.target, min(held)
        with torch.no_grad(), target.starting_at(first, self.inputs[first]), observe(observer):
            hidden = self.prefilled.predictions(target.hidden(self.prefilled.tail, copy_cache(self.prefilled.cache)))
            return mean_divergence((self.reference[rows], target.logits(hidden[rows])) for rows in chunks(len(hidden)))


class _TailLayer(DynamicLayer):
    """A growing layer with room for the tail, whose rows each rerun writes anew: no copy of the past."""

    def __init__(self, past: DynamicLayer, n_tail: int):
        super().__init__()
        self.lazy_initialization(past.keys, past.values)
        self.n_past = past.keys.shape[-2]
        self.keys, self.values = (self._with_room(x, n_tail) for x in (past.keys, past.values))

    @staticmethod
    def _with_room(past: torch.Tensor, n_tail: int) -> torch.Tensor:
        room = past.new_empty((*past.shape[:2], past.shape[2] + n_tail, past.shape[3]))
        room[:, :, : past.shape[2]] = past
        return room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():  # gradients do not pass through rows that are written in place
            rows = slice(self.n_past)
            return torch.cat([self.keys[:, :, rows], key_states], 2), torch.cat(
                [self.values[:, :, rows], value_states], 2
            )
        self.keys[:, :, self.n_past :] = key_states
        self.values[:, :, self.n_past :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.n_past


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """Layers of its own over the same tensors: sliding layers replace theirs, they never write in place."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def prefill(
    target: Target,
    tokens: Sequence[int],
    n_tail: int,
    scorer: str,
    plans: Sequence[LayerCells],
    on_prefill: Callable[[int], None] = lambda n: None,
    asked: Sequence[int] = (),
) -> Prefilled:
    """Run a window up to its tail.

    Args:
        tokens: the window; its last `n_tail` are the tail.
        on_prefill: told the number of tokens of each chunk.
        asked: positions of the tokens that count, all but the first of the tail at most; none for all of it.
    """
    n_past = len(tokens) - n_tail
    ids = torch.tensor([list(tokens)], device=target.device)
    samples = _QuerySamples(scorer, len(tokens), plans)
    cache = target.new_cache()
    with torch.no_grad(), observe(samples.observe):
        for at in range(0, n_past, _PREFILL_CHUNK):
            samples.start = at
            chunk = ids[:, at : min(at + _PREFILL_CHUNK, n_past)]
            target.hidden(chunk, cache)
            on_prefill(chunk.shape[1])
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                cache.layers[i] = _TailLayer(layer, n_tail)
    return Prefilled(target, ids[:, n_past:], n_past, cache, scorer, plans, samples, tuple(asked))


def run_tail(prefilled: Prefilled) -> Window:
    """Run the tail with full caches, and simulate eviction in every layer for every plan."""
    target = prefilled.target
    held: dict[int, list[list[Held] | None]] = {}

    def observer(call: AttentionCall) -> torch.Tensor:
        held[call.layer] = prefilled.simulate(call)
        return attend(call)

    with torch.no_grad():
        with observe(observer), layer_inputs(target.layers) as inputs:
            hidden = prefilled.predictions(target.hidden(prefilled.tail, copy_cache(prefilled.cache)))
        reference = torch.cat([target.logits(hidden[rows]) for rows in chunks(len(hidden))])
    return Window(prefilled, inputs, reference, held)


class _QuerySamples:
    """The queries that some plan samples, kept from prefill: a few of all, so that memory stays small."""

    def __init__(self, scorer: str, n_tokens: int, plans: Sequence[LayerCells]):
        wanted = np.zeros(n_tokens, bool)
        if SCORERS[scorer].needs_attn:
            for ubatch in {plan.n_ubatch for plan in plans}:
                wanted[np.concatenate(sampled_queries(scorer, n_tokens, ubatch))] = True
        self.wanted = wanted
        self.start = 0  # position of the first query of the running chunk
        self.kept: dict[int, list[torch.Tensor]] = {}

    def observe(self, call: AttentionCall) -> torch.Tensor:
        rows = np.flatnonzero(self.wanted[self.start : self.start + call.query.shape[2]])
        self.kept.setdefault(call.layer, []).append(call.query[0][:, torch.from_numpy(rows).to(call.query.device)])
        return attend(call)

    def of(self, call: AttentionCall, n_past: int) -> tuple[np.ndarray, torch.Tensor]:
        """(pos [n], queries [n_heads, n, head_size]) of a layer that runs its tail."""
        rows = np.flatnonzero(self.wanted[n_past:])
        tail = call.query[0][:, torch.from_numpy(rows).to(call.query.device)]
        return np.flatnonzero(self.wanted), torch.cat([*self.kept[call.layer], tail], dim=1)


def _attention_of(call: AttentionCall, samples: tuple[np.ndarray, torch.Tensor], mass: Mass) -> AttentionOf:
    """Attention for `engine.sim.simulate`, after llama_kv_cache_depth::compute_attn()."""
    sample_pos, queries = samples
    n_heads, _, head_size = queries.shape
    key = call.key[0]
    n_heads_kv = key.shape[0]

    def attention_of(query_pos: np.ndarray, cell_pos: np.ndarray) -> np.ndarray:
        cells = torch.from_numpy(cell_pos).to(key.device)
        rows = torch.from_numpy(np.searchsorted(sample_pos, query_pos)).to(key.device)
        # the heads of a group are rows of one matrix: each key is read once for all of them
        q = queries[:, rows].reshape(n_heads_kv, -1, head_size)
        scores_mask = torch.from_numpy(cell_pos[None, :] <= query_pos[:, None]).to(key.device)
        weights = _group_weights(call, q, key[:, cells], scores_mask, n_heads)
        return mass(weights, call.value[0][:, cells].float()).cpu().numpy()

    return attention_of


def _group_weights(
    call: AttentionCall, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, n_heads: int
) -> torch.Tensor:
    """Float32 [n_heads_kv, n_group * n_queries, n_cells]."""
    n_heads_kv, n_rows, _ = query.shape
    n_group = n_heads // n_heads_kv
    if call.sinks is None:
        return attention_weights(query, key, mask.repeat(n_group, 1), call)
    # each head has a sink of its own
    query = query.reshape(n_heads, n_rows // n_group, -1)
    weights = attention_weights(query, key.repeat_interleave(n_group, dim=0), mask, call)
    return weights.reshape(n_heads_kv, n_rows, -1)


def chunks(n: int) -> Iterator[slice]:
    """Rows of the head, a bounded number at a time."""
    for at in range(0, n, _HEAD_CHUNK):
        yield slice(at, at + _HEAD_CHUNK)
