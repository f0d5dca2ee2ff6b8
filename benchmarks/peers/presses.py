"""kvpress's part of the comparison; runs in the environment of requirements.txt.

    .venv-peers/bin/python -m benchmarks.peers.presses PLAN.json

Each press compresses as it does by itself: after the attention of a layer, in one pass over the whole prompt. The pass
itself does not depend on the press, so one serves all presses and keep ratios: every press gets a cache of its own to
compress, through its own forward hook. `check_shared_pass` compares that with the press alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from benchmarks.peers.plan import FACTS, FULL, KVPRESS, KVPRESS_STORE, Item, Plan, Window, one_pass_cells, record_key
from benchmarks.peers.score import ask, score_tail
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.progress import LongWork
from depthkv_edge.quality.store import Record, Store

_ATTENTION = "peers"
_PROBE_TOKENS = 384  # of the check that a shared pass changes nothing
_TOLERANCE = 1e-4  # of a logit, relative to the largest one


def make_press(name: str, ratio: float) -> kvpress.BasePress:
    """A press as kvpress ships it, but for the share that it keeps."""
    return getattr(kvpress, f"{name}Press")(compression_ratio=1 - ratio)


def load(plan: Plan) -> PreTrainedModel:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    AttentionInterface.register(_ATTENTION, _attend)
    model = AutoModelForCausalLM.from_pretrained(
        plan.model, dtype=torch.float32, attn_implementation=_ATTENTION, local_files_only=True
    )
    return model.eval().requires_grad_(False)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention after however many cells this layer kept.

    transformers' own masks have the width of the first layer, which is wrong for a press that gives layers different
    sizes, unless tokens come one at a time.
    """
    for name in ("sliding_window", "softcap", "s_aux"):
        if others.get(name) is not None:
            raise DepthKVError(f"attention of {type(module).__name__} has a {name}, which is not known here")
    n, n_cells = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    mask = None if n == n_cells else torch.ones(n, n_cells, dtype=torch.bool, device=key.device).tril(n_cells - n)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
    )
    return output.transpose(1, 2).contiguous(), None


def compress(
    model: PreTrainedModel, prompt: Sequence[int], presses: Sequence[kvpress.BasePress]
) -> tuple[DynamicCache, list[DynamicCache]]:
    """Read a prompt in one pass.

    Returns:
        The full cache, and what each press leaves of it.
    """
    full, left = DynamicCache(), [DynamicCache() for _ in presses]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        layer = full.layers[module.layer_idx]
        for press, cache in zip(presses, left, strict=True):
            cache.layers.append(_same_tensors(layer))
            press.forward_hook(module, args, kwargs | {"past_key_values": cache}, output)

    handles = []
    for press in presses:
        press.post_init_from_model(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as BasePress.__call__ does
        handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    try:
        model.model(input_ids=torch.tensor([list(prompt)]), past_key_values=full)
    finally:
        for handle in handles:
            handle.remove()
    return full, left


def predict(model: PreTrainedModel, cache: DynamicCache, n_prompt: int, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [n, n_vocab] of what follows each token after a prompt. The cache stays as it is.

    Kept keys keep their positions, and the tokens go on where the prompt ended, as in kvpress's pipeline.
    """
    own = copy.copy(cache)
    own.layers = [_same_tensors(layer) for layer in cache.layers]
    position_ids = torch.arange(n_prompt, n_prompt + len(tokens))[None]
    ids = torch.tensor([list(tokens)])
    return model(input_ids=ids, past_key_values=own, position_ids=position_ids).logits[0]


def _same_tensors(layer: DynamicLayer) -> DynamicLayer:
    own = DynamicLayer()
    own.lazy_initialization(layer.keys, layer.values)
    own.keys, own.values = layer.keys, layer.values  # a layer that grows replaces them
    return own


def kept_tokens(cache: DynamicCache) -> list[int]:
    """Tokens that each layer holds."""
    return [layer.keys.shape[2] for layer in cache.layers]


# --- checks ---------------------------------------------------------------------------------------------------------


def check_reference(model: PreTrainedModel, plan: Plan) -> float:
    """Largest difference of a logit from the other environment's, full cache, relative to the largest logit.

    Raises:
        DepthKVError: it is too large: the two do not run the same model.
    """
    with np.load(plan.reference) as reference:
        positions, expected = torch.from_numpy(reference["positions"]), torch.from_numpy(reference["logits"])
    tokens = torch.tensor([plan.probe])
    found = model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits[0]
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise DepthKVError(
            f"logits of {plan.model} differ by {difference:.1e} of the largest one between transformers "
            f"{transformers.__version__} here and the environment that exported it; at most {_TOLERANCE:g} is "
            f"rounding: remove the directory to export it again, or pin another transformers in requirements.txt"
        )
    return difference


class _CountingCache(DynamicCache):
    """A cache that knows how many cells all layers held at most."""

    peak = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        updated = super().update(*args, **kwargs)
        self.peak = max(self.peak, sum(kept_tokens(self)))
        return updated


def check_shared_pass(model: PreTrainedModel, plan: Plan) -> None:
    """A pass that serves several presses must leave each what a pass of its own leaves it, and as much at its peak.

    Raises:
        DepthKVError: it does not.
    """
    prompt = plan.probe[:_PROBE_TOKENS]
    ratio = plan.ratios[0]
    _, left = compress(model, prompt, [make_press(name, ratio) for name in plan.presses])
    for name, shared in zip(plan.presses, left, strict=True):
        alone = _CountingCache()
        with make_press(name, ratio)(model):
            model.model(input_ids=torch.tensor([prompt]), past_key_values=alone)
        same = kept_tokens(alone) == kept_tokens(shared) and all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(alone.layers, shared.layers, strict=True)
        )
        peak = one_pass_cells(kept_tokens(alone), len(prompt), 0)["peak"]
        if not same or peak != alone.peak:
            raise DepthKVError(f"{name} leaves another cache alone than beside other presses: run presses one by one")


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(model: PreTrainedModel, plan: Plan, store: Store) -> None:
    """Everything that is not in the store yet."""
    todo = plan.missing(store, KVPRESS, plan.presses)
    with LongWork() as watcher:
        watcher.begin(sum(item.n_prompt + (1 + len(missing)) * item.n_after for item, missing in todo))
        for item, missing in todo:
            watcher.title(f"kvpress: {item.text}")
            full, left = compress(model, item.prompt, [make_press(*line) for line in missing])
            watcher.advance(item.n_prompt)
            reference = predict(model, full, item.n_prompt, item.tail) if isinstance(item, Window) else None
            for line, cache in zip([(FULL, 1.0), *missing], [full, *left], strict=True):
                store[record_key(item, KVPRESS, *line)] = _record(model, cache, item, reference)
                watcher.advance(item.n_after)


def _record(model: PreTrainedModel, cache: DynamicCache, item: Item, reference: torch.Tensor | None) -> Record:
    cells = {"cells": one_pass_cells(kept_tokens(cache), item.n_prompt, item.n_tail)}
    if isinstance(item, Window):
        return cells | score_tail(reference, predict(model, cache, item.n_prompt, item.tail), item.tail)
    return cells | ask(item, lambda tokens: predict(model, cache, item.n_prompt, tokens))


def main(path: str) -> None:
    plan = Plan.read(Path(path))
    torch.set_num_threads(plan.n_threads)
    store = Store(Path(plan.records) / KVPRESS_STORE)
    if FACTS in store and not plan.missing(store, KVPRESS, plan.presses):
        return
    with torch.inference_mode():
        model = load(plan)
        difference = check_reference(model, plan)
        check_shared_pass(model, plan)
        measure(model, plan, store)
    versions = {"kvpress": version("kvpress"), "transformers": transformers.__version__, "torch": torch.__version__}
    store[FACTS] = {"versions": versions, "logit_difference": difference}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DepthKVError as error:
        sys.exit(f"Error: {error}")
