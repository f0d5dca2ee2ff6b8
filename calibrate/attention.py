"""Attention of any transformers model, seen and altered from outside.

Registers itself with transformers' attention and mask interfaces (transformers.AttentionInterface), so queries, keys
and values arrive as the model made them, after its norms and rotary positions, whatever its family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from depthkv_edge.errors import DepthKVError

NAME = "depthkv"

# scalars that some family passes along and that attention itself does not depend on
_IGNORED = {"dropout", "sliding_window", "position_ids", "cache_position", "is_causal", "use_cache"}


@dataclass(frozen=True)
class AttentionCall:
    """One layer asks for attention.

    Attributes:
        module: the attention module of the layer.
        layer: layer index in the model.
        query: [1, n_heads, n_queries, head_size].
        key, value: [1, n_heads_kv, n_cells, head_size], the earlier tokens included.
        mask: bool [1, 1, n_queries, n_cells], true where the query may see the key.
        scaling: factor of the attention scores.
        softcap: bound of the scores, as in Gemma-2, or none.
        sinks: [n_heads] learned score of a sink that is no token, as in gpt-oss, or none.
    """

    module: nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


Observer = Callable[[AttentionCall], torch.Tensor]


def attend(call: AttentionCall, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention output [1, n_heads, n_queries, head_size] under the call's mask, or another."""
    if mask is None:
        mask = call.mask
    else:
        # a narrower mask: leave out the keys that no query sees
        seen = mask.any(dim=2).flatten().nonzero().squeeze(1)
        key, value = call.key.index_select(2, seen), call.value.index_select(2, seen)
        call, mask = replace(call, key=key, value=value), mask.index_select(3, seen)
    gqa = call.query.shape[1] != call.key.shape[1]
    if call.softcap is None and call.sinks is None:
        return functional.scaled_dot_product_attention(
            call.query, call.key, call.value, attn_mask=mask, scale=call.scaling, enable_gqa=gqa
        )
    n_group = call.query.shape[1] // call.key.shape[1]
    value = call.value.repeat_interleave(n_group, dim=1)
    weights = attention_weights(call.query, call.key.repeat_interleave(n_group, dim=1), mask, call)
    return weights.to(value.dtype) @ value


def attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Float32 softmax [..., n_queries, n_cells] of scaled, capped scores; heads of query and key must agree.

    Args:
        query: [..., n_heads, n_queries, head_size].
        key: [..., n_heads, n_cells, head_size].
        mask: bool, broadcast to the scores.
        call: where scaling, softcap and sinks are taken from.
    """
    scores = (query @ key.transpose(-1, -2)).float() * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is None:
        return scores.softmax(dim=-1)
    sinks = call.sinks.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


_observer: Observer = attend


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Answer every attention call by `observer` while the block runs."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    unknown = [name for name, x in others.items() if isinstance(x, torch.Tensor) and name not in _IGNORED]
    if unknown:
        raise DepthKVError(
            f"attention of {type(module).__name__} has an input '{unknown[0]}' that calibration does not know: "
            "calibrate another architecture"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None or attention_mask is None or not getattr(module, "is_causal", True):
        raise DepthKVError(
            f"attention of {type(module).__name__} is not that of a causal decoder layer: calibrate another model"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(module, layer, query, key, value, attention_mask, scaling, softcap, s_aux)
    return _observer(call).transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    # always a tensor: an observer narrows it
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
