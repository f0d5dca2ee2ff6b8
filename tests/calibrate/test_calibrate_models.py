"""Every family: what is measured is what a whole pass of the model under a mask gives; what cannot work is refused."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_hf import FAMILIES, REFUSED, make_model, make_tokens

from depthkv_edge.calibrate import exact, fast
from depthkv_edge.calibrate.attention import AttentionCall
from depthkv_edge.calibrate.divergence import divergence
from depthkv_edge.calibrate.layer_cells import LayerCells
from depthkv_edge.calibrate.scorers import mass_of
from depthkv_edge.calibrate.target import inspect_model
from depthkv_edge.calibrate.window import _attention_of, prefill, run_tail
from depthkv_edge.engine.sim import Held
from depthkv_edge.errors import DepthKVError

N_TOKENS, N_TAIL = 300, 60


@functools.cache
def opened(family: str, scorer: str = "attention"):
    """A window of a family with plans of 80 and 220 cells, and of as many as there are tokens."""
    target = inspect_model(make_model(family))
    plans = [LayerCells((n,) * len(target.layer_ids)) for n in (80, 220, N_TOKENS)]
    return run_tail(prefill(target, make_tokens(N_TOKENS), N_TAIL, scorer, plans))


def whole_pass(family: str, masks: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits [n, n_vocab] by transformers' eager attention in one pass without a cache; masks bool [n, n] by layer."""
    model = make_model(family)
    model.set_attn_implementation("eager")
    handles = []
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if layer in masks and name.endswith("self_attn"):

            def narrow(module, args, kwargs, mask=masks[layer]):
                return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(~mask, float("-inf"))}

            handles.append(module.register_forward_pre_hook(narrow, with_kwargs=True))
    assert len(handles) == len(masks)
    with torch.no_grad():
        return model(torch.tensor([make_tokens(N_TOKENS)]), use_cache=False).logits[0]


def mask_of(window, layer: int, plan: int) -> torch.Tensor:
    """bool [n, n], one query at a time; queries before the tail see everything."""
    mask = torch.ones(N_TOKENS, N_TOKENS, dtype=torch.bool).tril()
    ubatches = window.held[layer][plan]
    for query in range(N_TOKENS - N_TAIL, N_TOKENS):
        ubatch = [u for u in ubatches if u.start <= query][-1]
        mask[query, : ubatch.start] = False
        mask[query, ubatch.pos.tolist()] = True
    return mask


def slow_divergence(full: torch.Tensor, pruned: torch.Tensor) -> float:
    p, q = (x[-N_TAIL:].double().log_softmax(dim=-1) for x in (full, pruned))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_a_whole_pass_under_a_mask(family):
    window, full = opened(family), whole_pass(family, {})
    torch.testing.assert_close(window.reference, full[-N_TAIL:], rtol=1e-4, atol=1e-5)
    layers = window.prefilled.target.layer_ids
    assert layers == FAMILIES[family][2]
    everything = [Held(0, np.empty(0, np.int64))]  # one ubatch of the whole window: a token sees all earlier ones
    for layer in layers:
        measured = exact.measure_layer(window, layer)
        expected = [slow_divergence(full, whole_pass(family, {layer: mask_of(window, layer, plan)})) for plan in (0, 1)]
        assert min(expected) > 1e-6  # the masks do something
        assert measured[:2] == pytest.approx(expected, rel=0.02, abs=1e-7)
        assert measured[2] == 0
        assert replace(window, held={layer: [everything]}).rerun({layer: 0}) < 1e-9, "nothing is pruned"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_layers_at_once(family):
    window = opened(family)
    layers = window.prefilled.target.layer_ids
    masks = {layer: mask_of(window, layer, 0) for layer in layers}
    expected = slow_divergence(whole_pass(family, {}), whole_pass(family, masks))
    assert window.rerun(dict.fromkeys(layers, 0)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scorer", ["window", "streaming", "random"])
def test_other_scorers(scorer):
    window = opened("llama", scorer)
    full = whole_pass("llama", {})
    expected = slow_divergence(full, whole_pass("llama", {1: mask_of(window, 1, 0)}))
    assert exact.measure_layer(window, 1)[0] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_has_the_order_of_exact(family):
    window = opened(family)
    estimated = fast.measure_window(window.prefilled, seed=0)
    layers = window.prefilled.target.layer_ids
    assert tuple(estimated) == layers
    measured = {layer: exact.measure_layer(window, layer) for layer in layers}
    for layer in layers:
        assert estimated[layer][2] == 0
        assert min(estimated[layer][:2]) > 0
        assert 0.1 < estimated[layer][0] / measured[layer][0] < 10
    assert sum(e[0] for e in estimated.values()) > sum(e[1] for e in estimated.values())
    assert max(layers, key=lambda i: estimated[i][0]) == max(layers, key=lambda i: measured[i][0])


def test_fast_is_reproducible():
    prefilled = opened("llama").prefilled
    assert fast.measure_window(prefilled, seed=3) == fast.measure_window(prefilled, seed=3)
    assert fast.measure_window(prefilled, seed=3) != fast.measure_window(prefilled, seed=4)
    assert fast.measure_window(prefilled, seed=2**70)  # more than torch takes


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    model = make_model(family)
    with pytest.raises(DepthKVError) as refusal:
        inspect_model(model)
    line = str(refusal.value)
    assert REFUSED[family][2] in line
    assert type(model).__name__ in line
    assert "\n" not in line


def test_what_travels_beside_the_hidden_states_is_refused():
    model = make_model("llama")
    decoder = model.get_decoder()
    aside = {}
    decoder.layers[0].register_forward_hook(lambda module, args, output: aside.update(x=output))
    decoder.layers[3].register_forward_hook(lambda module, args, output: output + aside.pop("x", 0))
    with pytest.raises(DepthKVError, match="LlamaForCausalLM.*does not give the same logits"):
        inspect_model(model)


def test_what_fails_without_a_cache_is_refused_by_name():
    model = make_model("llama")
    decoder, hooks = model.get_decoder(), model.get_decoder().layers[0]._forward_hooks
    forward = decoder.forward
    decoder.forward = lambda *args, use_cache=None, **kwargs: forward(*args, **kwargs) if use_cache else 1 / 0
    with pytest.raises(DepthKVError, match="LlamaForCausalLM: its layers cannot be run again.*division by zero"):
        inspect_model(model)
    assert not hooks


def test_a_model_without_finite_logits():
    model = make_model("llama")
    with torch.no_grad():
        model.get_decoder().layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(DepthKVError, match="logits are not numbers.*--dtype float32"):
        inspect_model(model)


@pytest.mark.parametrize("broken", [float("nan"), float("-inf"), float("inf")])
def test_what_is_not_finite_is_no_divergence_of_0(broken):
    full = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]] * 2)
    pruned = full.clone()
    pruned[0, 0] = broken
    pruned[1, 3] = 5.0  # of a token that the model rules out
    found = divergence(full, pruned)
    assert not found[0].isfinite() and found[1] == 0
    assert not divergence(pruned, full)[0].isfinite() or broken == float("-inf")


def test_fast_says_what_is_not_finite():
    model = make_model("llama")
    with torch.no_grad():
        target = inspect_model(model)
        model.lm_head.weight[0, 0] = float("nan")
    plans = [LayerCells((80,) * 4)]
    found = fast.measure_window(prefill(target, make_tokens(N_TOKENS), N_TAIL, "streaming", plans), 0)
    assert all(np.isnan(curve).all() for curve in found.values())


@settings(max_examples=30, deadline=None)
@given(
    n_heads_kv=st.integers(1, 3),
    n_group=st.integers(1, 3),
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.booleans(),
    weights_value=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_attention_mass_one_number_at_a_time(n_heads_kv, n_group, softcap, sinks, weights_value, seed):
    generator = torch.Generator().manual_seed(seed)
    n, n_heads, size = 12, n_heads_kv * n_group, 4
    query, key, value = (
        torch.randn(1, heads, n, size, generator=generator) for heads in (n_heads, n_heads_kv, n_heads_kv)
    )
    sink = torch.randn(n_heads, generator=generator) if sinks else None
    call = AttentionCall(None, 0, query, key, value, None, 0.7, softcap, sink)
    queries, cells = np.array([5, 8, 11]), np.array([0, 1, 4, 6, 9])
    mass = mass_of("attention" if weights_value else "window")
    found = _attention_of(call, (np.arange(n), query[0]), mass)(queries, cells)
    expected = np.zeros(len(cells))
    for head in range(n_heads):
        of = head // n_group
        for q in queries:
            scores = [float(query[0, head, q] @ key[0, of, c]) * 0.7 for c in cells]
            scores = [softcap * np.tanh(s / softcap) if softcap else s for s in scores]
            weights = np.array([np.exp(s) if c <= q else 0.0 for s, c in zip(scores, cells, strict=True)])
            weights /= weights.sum() + (np.exp(float(sink[head])) if sinks else 0)
            norms = [float(value[0, of, c].abs().sum()) if weights_value else 1.0 for c in cells]
            expected += weights * norms
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(scale=st.sampled_from([1e-4, 1e-2, 1.0, 30.0]), seed=st.integers(0, 2**31))
def test_divergence_against_the_textbook(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    full = 4 * torch.randn(3, 50, generator=generator)
    pruned = full + scale * torch.randn(3, 50, generator=generator)
    p, q = (x.double().log_softmax(dim=-1) for x in (full, pruned))
    expected = (p.exp() * (p - q)).sum(dim=-1)
    assert divergence(full, pruned).tolist() == pytest.approx(expected.tolist(), rel=2e-3, abs=1e-12)
    assert divergence(full, full).tolist() == [0, 0, 0]
