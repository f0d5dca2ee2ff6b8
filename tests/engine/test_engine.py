"""What the cache holds, drops and saves, on real models.

Orders of calls are in test_cache_states.py, going back is in test_rollback.py, and that a cache which evicts nothing
computes what stock llama.cpp does is in tests/native/test_zoo.py.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from statistics import mean

import pytest

from depthkv_edge import KVStats, Llama
from depthkv_edge.engine.context import Options, load_without_weights, plan_context
from depthkv_edge.engine.rules import SCORERS

N_SINK, N_RECENT = 4, 32  # the defaults


def decode(llama: Llama, token: int, n: int) -> list[int]:
    """Greedy tokens after `token`, which is the next one to be computed."""
    return list(islice(llama.generate([token], temp=0.0, reset=False), n))


def prefill(llama: Llama, tokens: list[int]) -> int:
    """Compute all but the last token from an empty context, and return that one."""
    llama.reset()
    llama.eval(tokens[:-1])
    return tokens[-1]


def check_consistent(llama: Llama) -> KVStats:
    """Positions, occupancy and statistics tell the same story; sinks and recent tokens are there."""
    stats = llama.kv_stats()
    seen = llama.n_tokens
    protected = set(range(min(N_SINK, seen))) | set(range(max(0, seen - N_RECENT), seen))
    for i, layer in enumerate(stats.layers):
        positions = llama.kv_positions(i)
        assert positions == sorted(set(positions))
        assert len(positions) == layer.used <= layer.cells
        assert positions[-1] == seen - 1
        assert protected <= set(positions)
        assert layer.used <= seen <= layer.used + layer.evicted
    return stats


# sizes


def test_bytes_within_budget(smollm2):
    with load_without_weights(smollm2) as model:
        for n_ctx in (2048, 8192):
            full = plan_context(model, Options(n_ctx=n_ctx)).kv
            assert (full.active, full.budget) == (False, 1.0)
            assert full.bytes == full.bytes_full == 30 * n_ctx * 2 * 3 * 64 * 2
            for budget in ("0.9", "0.6", "0.3", "0.15"):
                kv = plan_context(model, Options(n_ctx=n_ctx, budget=budget)).kv
                cells = [layer.cells for layer in kv.layers]
                assert kv.active and kv.bytes_full == full.bytes
                assert kv.bytes == sum(layer.bytes for layer in kv.layers) <= Fraction(budget) * full.bytes
                assert float(budget) * n_ctx - 32 / 30 < mean(cells) <= float(budget) * n_ctx + 1e-6
                assert kv.n_ubatch <= min(cells)


# eviction


@pytest.mark.parametrize(
    ("scorer", "flash_attn"), [*((name, None) for name in SCORERS), ("attention", True), ("window", True)]
)
def test_never_above_the_cells(load, tokens, scorer, flash_attn):
    llama = load(kv_budget=0.5, scorer=scorer, flash_attn=flash_attn)
    for start in range(0, 448, 64):
        llama.eval(tokens[start : start + 64])
        check_consistent(llama)
    stats = llama.kv_stats()
    assert stats.scorer == scorer
    assert stats.n_evict == sum(layer.evicted for layer in stats.layers) > 0
    held = [llama.kv_positions(i) for i in range(30)]
    if scorer == "streaming":
        assert all(p == [*range(N_SINK), *range(448 - len(p) + N_SINK, 448)] for p in held), "the newest"
    if scorer == "attention":
        assert len(set(map(tuple, held))) > 15, "layers keep tokens of their own choice"
    decode(llama, tokens[448], 40)
    check_consistent(llama)


def test_sinks_and_recent_tokens_can_be_chosen(load, tokens):
    llama = load(kv_budget=0.5, n_sink=20, n_recent=100)
    llama.eval(tokens[:450])
    assert llama.kv_stats().n_evict > 0
    for i in range(30):
        assert set(range(20)) | set(range(350, 450)) <= set(llama.kv_positions(i))


def test_a_layer_says_why_it_holds_its_tokens(load, tokens):
    llama = load(n_ctx=512, kv_budget=0.5, n_sink=4, n_recent=32)
    llama.pin(20, 30)
    prefill(llama, tokens[:400])
    for layer in llama.kv_stats().layers:
        assert layer.evicted > 0
        assert (layer.sinks, layer.pinned, layer.recent) == (4, 10, 32)
        assert layer.chosen == layer.used - 46 > 0
    stock = load(n_ctx=512)
    prefill(stock, tokens[:100])
    layers = stock.kv_stats().layers
    assert all((each.sinks, each.pinned, each.recent, each.chosen) == (0, 0, 0, each.used) for each in layers)


def test_pinned_tokens_stay(load, tokens):
    llama = load(kv_budget=0.5, scorer="streaming")
    llama.eval(tokens[:100])
    llama.pin(20, 60)
    llama.eval(tokens[100:450])
    assert all(set(range(20, 60)) <= set(llama.kv_positions(i)) for i in range(30))
    llama.unpin()
    llama.eval(tokens[450:500])
    assert not any(set(range(20, 60)) & set(llama.kv_positions(i)) for i in range(30))


def test_emptied_is_as_new(load, tokens):
    llama = load(kv_budget=0.5)
    first = decode(llama, prefill(llama, tokens[:400]), 12)
    held = [llama.kv_positions(i) for i in range(30)]
    layers = llama.kv_stats().layers
    assert decode(llama, prefill(llama, tokens[:400]), 12) == first
    assert [llama.kv_positions(i) for i in range(30)] == held
    assert llama.kv_stats().layers == layers
    llama._ctx.kv_cache_clear()
    assert all(layer.used == layer.evicted == 0 for layer in llama.kv_stats().layers)


# several contexts


def test_two_contexts_with_different_budgets(load, tokens):
    alone = {}
    for budget in (0.6, 0.3):
        llama = load(kv_budget=budget)
        alone[budget] = decode(llama, prefill(llama, tokens[:400]), 12)
        llama.close()
    a, b = load(kv_budget=0.6), load(kv_budget=0.3)
    a.reset(), b.reset()
    for start in range(0, 399, 64):  # in turns
        for llama in (a, b):
            llama.eval(tokens[start : min(start + 64, 399)])
    assert decode(a, tokens[399], 12) == alone[0.6]
    assert decode(b, tokens[399], 12) == alone[0.3]
    assert a.kv_stats().bytes > b.kv_stats().bytes
    assert b.kv_stats().n_evict > a.kv_stats().n_evict


# state write/load


@pytest.mark.parametrize("options", [{"flash_attn": False}, {"flash_attn": True, "type_k": 8, "type_v": 8}])
def test_save_restore_continue(load, tokens, options):
    llama = load(kv_budget=0.5, **options)
    token = prefill(llama, tokens[:400])
    state = llama.save_state()
    held = [llama.kv_positions(i) for i in range(30)]
    # long enough to evict again, so that the restored scores matter
    expected = decode(llama, token, 60)
    after = [llama.kv_positions(i) for i in range(30)]
    assert after != held
    for other in llama, load(kv_budget=0.5, **options):
        other.load_state(state)
        assert [other.kv_positions(i) for i in range(30)] == held
        check_consistent(other)
        assert decode(other, token, 60) == expected
        assert [other.kv_positions(i) for i in range(30)] == after


def test_state_of_another_budget_is_refused(load, tokens):
    big, small = load(kv_budget=0.9), load(kv_budget=0.3)
    big.eval(tokens[:400])
    state = big.save_state()
    with pytest.raises(RuntimeError):
        small.load_state(state)
    small.reset()
    small.eval(tokens[:300])
    check_consistent(small)


# sliding windows


def test_gemma3_budget_on_global_layers_only(load, gemma3, text):
    llama = load(gemma3, n_ctx=2048, kv_budget=0.3, n_batch=128)
    stats = llama.kv_stats()
    assert [layer.layer for layer in stats.layers] == [5, 11, 17]
    growing = sum(layer.bytes for layer in stats.layers)
    window = stats.bytes - growing
    assert 0 < growing <= 0.3 * (stats.bytes_full - window)
    llama.eval(llama.tokenize(text[:6000].encode())[:1000])
    stats = llama.kv_stats()
    assert all(layer.evicted > 0 and layer.used <= layer.cells for layer in stats.layers)
    decode(llama, llama.tokenize(b" the", add_bos=False)[0], 8)


def test_gemma3_bytes_count_the_windows(gemma3):
    with load_without_weights(gemma3) as model:
        full, half = (plan_context(model, Options(n_ctx=8192, budget=budget)).kv for budget in ("1", "24MiB"))
    assert half.active and half.bytes <= 24 * 2**20 < full.bytes
