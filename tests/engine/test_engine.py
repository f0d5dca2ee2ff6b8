"""What the cache holds, drops, saves and rolls back, on real models."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import islice
from statistics import mean

import pytest
from conftest import run_python

from depthkv_edge import KVStats, Llama

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


@pytest.mark.parametrize("n_ctx", [2048, 8192])
@pytest.mark.parametrize("budget", [0.9, 0.6, 0.3, 0.15])
def test_bytes_within_budget(load, budget, n_ctx):
    stats = load(n_ctx=n_ctx, kv_budget=budget).kv_stats()
    assert stats.active
    assert stats.bytes_full == 30 * n_ctx * 2 * 3 * 64 * 2
    assert stats.bytes <= Fraction(str(budget)) * stats.bytes_full
    assert stats.bytes == sum(layer.bytes for layer in stats.layers)
    cells = [layer.cells for layer in stats.layers]
    assert budget * n_ctx - 32 / 30 < mean(cells) <= budget * n_ctx + 1e-6
    assert stats.n_ubatch <= min(cells)


def test_no_budget_is_the_full_cache(load):
    llama = load()
    stats = llama.kv_stats()
    assert not stats.active
    assert stats.budget == 1.0
    assert stats.bytes == stats.bytes_full == 30 * 512 * 2 * 3 * 64 * 2


# the same as stock


@pytest.mark.parametrize("flash_attn", [False, True])
def test_nothing_evicted_gives_the_stock_text(load, tokens, flash_attn):
    options = {"n_ctx": 1024, "n_ubatch": 32, "flash_attn": flash_attn}
    stock, ours = load(**options), load(**options, kv_budget=0.9)
    assert ours.kv_stats().n_ubatch == 32
    expected = decode(stock, prefill(stock, tokens[:400]), 32)
    assert decode(ours, prefill(ours, tokens[:400]), 32) == expected
    assert ours.kv_stats().n_evict == 0
    assert all(layer.used == ours.n_tokens for layer in ours.kv_stats().layers)


def test_no_budget_gives_the_stock_text(load, smollm2, tokens):
    from depthkv_edge.engine.capi import llama_cpp

    stock = llama_cpp.Llama(
        str(smollm2), n_ctx=512, n_batch=64, n_ubatch=64, n_threads=2, n_threads_batch=2, verbose=False
    )
    ours = load()
    expected = decode(stock, prefill(stock, tokens[:300]), 32)
    stock.close()
    assert decode(ours, prefill(ours, tokens[:300]), 32) == expected


# eviction


@pytest.mark.parametrize("scorer", ["attention", "window", "streaming", "random"])
def test_never_above_the_cells(load, tokens, scorer):
    llama = load(kv_budget=0.5, scorer=scorer)
    for start in range(0, 448, 64):
        llama.eval(tokens[start : start + 64])
        check_consistent(llama)
    stats = llama.kv_stats()
    assert stats.scorer == scorer
    assert stats.n_evict == sum(layer.evicted for layer in stats.layers) > 0
    decode(llama, tokens[448], 40)
    check_consistent(llama)


def test_streaming_keeps_the_newest(load, tokens):
    llama = load(kv_budget=0.5, scorer="streaming")
    llama.eval(tokens[:450])
    for i in range(30):
        positions = llama.kv_positions(i)
        assert positions == list(range(N_SINK)) + list(range(450 - len(positions) + N_SINK, 450))


def test_sinks_and_recent_tokens_can_be_chosen(load, tokens):
    llama = load(kv_budget=0.5, n_sink=20, n_recent=100)
    llama.eval(tokens[:450])
    assert llama.kv_stats().n_evict > 0
    for i in range(30):
        assert set(range(20)) | set(range(350, 450)) <= set(llama.kv_positions(i))


def test_the_same_tokens_are_evicted_every_time(load, tokens):
    def run() -> list[list[int]]:
        llama = load(kv_budget=0.4)
        llama.eval(tokens[:400])
        return [llama.kv_positions(i) for i in range(30)]

    assert run() == run()


def test_the_scorer_sees_more_than_position(load, tokens):
    llama = load(kv_budget=0.4)
    llama.eval(tokens[:450])
    held = {tuple(llama.kv_positions(i)) for i in range(30)}
    assert len(held) > 15, "layers keep tokens of their own choice"


def test_pinned_tokens_stay(load, tokens):
    llama = load(kv_budget=0.5, scorer="streaming")
    llama.eval(tokens[:100])
    llama.pin(20, 60)
    llama.eval(tokens[100:450])
    assert all(set(range(20, 60)) <= set(llama.kv_positions(i)) for i in range(30))
    llama.unpin()
    llama.n_tokens = 450
    llama.eval(tokens[450:500])
    assert not any(set(range(20, 60)) & set(llama.kv_positions(i)) for i in range(30))


# removal, rollback, chat


def test_removing_a_suffix_is_exact(load, tokens):
    llama = load(kv_budget=0.5)
    llama.eval(tokens[:384])
    before = [llama.kv_positions(i) for i in range(30)]
    assert llama.kv_stats().n_evict > 0
    assert llama._ctx.kv_cache_seq_rm(0, 370, -1), "of the last ubatch"
    assert [llama.kv_positions(i) for i in range(30)] == [[p for p in layer if p < 370] for layer in before]
    llama.n_tokens = 370
    llama.eval(tokens[370:400])
    check_consistent(llama)


def test_removing_a_span_is_exact(load, tokens):
    llama = load(kv_budget=0.5)
    llama.eval(tokens[:400])
    before = [llama.kv_positions(i) for i in range(30)]
    assert llama._ctx.kv_cache_seq_rm(0, 100, 200)
    expected = [[p for p in layer if not 100 <= p < 200] for layer in before]
    assert [llama.kv_positions(i) for i in range(30)] == expected


def test_a_shift_moves_positions(load, tokens):
    llama = load(kv_budget=0.5)
    llama.eval(tokens[:300])
    llama._ctx.kv_cache_seq_rm(0, 100, 150)
    before = [llama.kv_positions(i) for i in range(30)]
    llama._ctx.kv_cache_seq_shift(0, 150, -1, -50)
    assert [llama.kv_positions(i) for i in range(30)] == [[p if p < 150 else p - 50 for p in layer] for layer in before]
    llama.n_tokens = 250
    llama.eval(tokens[300:330])
    check_consistent(llama)


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


def test_ten_turns_with_prefix_reuse(load, tokens):
    llama = load(n_ctx=2048, kv_budget=0.25)
    history: list[int] = []
    evicted = 0
    for turn in range(10):
        history += tokens[turn * 90 : turn * 90 + 90]
        known = llama.n_tokens
        reply = list(islice(llama.generate(history, temp=0.0), 6))
        stats = check_consistent(llama)
        assert llama.n_tokens == len(history) + len(reply) - 1
        assert known <= llama.n_tokens
        assert stats.n_evict >= evicted, "what was evicted stays evicted"
        evicted = stats.n_evict
        history += reply
        if turn == 5:  # the user takes an answer back and asks something else
            history = history[:-60] + tokens[2000:2030]
            list(islice(llama.generate(history, temp=0.0), 6))
            check_consistent(llama)
    assert evicted > 0


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


CONTINUE = """
import pickle, sys
from itertools import islice
from depthkv_edge import Llama
path, options, state, token, n = pickle.load(open(sys.argv[1], "rb"))
llama = Llama(path, **options)
llama.load_state(state)
print(list(islice(llama.generate([token], temp=0.0, reset=False), n)))
print([llama.kv_positions(i) for i in range(30)])
"""


@pytest.mark.parametrize("options", [{"flash_attn": False}, {"flash_attn": True, "type_k": 8, "type_v": 8}])
def test_save_restore_continue(load, smollm2, tokens, tmp_path, options):
    options = options | {"kv_budget": 0.5, "n_ctx": 512, "n_batch": 64, "n_threads": 2, "n_threads_batch": 2}
    llama = load(**options)
    token = prefill(llama, tokens[:400])
    state = llama.save_state()
    held = [llama.kv_positions(i) for i in range(30)]
    # long enough to evict again, so that the restored scores matter
    expected = decode(llama, token, 60)
    after = [llama.kv_positions(i) for i in range(30)]
    assert after != held

    llama.load_state(state)
    assert [llama.kv_positions(i) for i in range(30)] == held
    check_consistent(llama)
    assert decode(llama, token, 60) == expected
    assert [llama.kv_positions(i) for i in range(30)] == after

    file = tmp_path / "state"
    file.write_bytes(pickle.dumps((str(smollm2), options | {"verbose": False}, state, token, 60)))
    outcome = run_python("-c", CONTINUE, str(file))
    assert outcome.out.splitlines() == [str(expected), str(after)], outcome.err


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

    full = load(gemma3, n_ctx=2048, n_batch=128, swa_full=False).kv_stats()
    assert stats.bytes < full.bytes
    llama.eval(llama.tokenize(text[:6000].encode())[:1000])
    stats = llama.kv_stats()
    assert all(layer.evicted > 0 and layer.used <= layer.cells for layer in stats.layers)
    decode(llama, llama.tokenize(b" the", add_bos=False)[0], 8)


def test_gemma3_nothing_evicted_gives_the_stock_text(load, gemma3, text):
    options = {"n_ctx": 1024, "n_ubatch": 32, "flash_attn": False, "swa_full": False}
    stock, ours = load(gemma3, **options), load(gemma3, **options, kv_budget=0.9)
    tokens = stock.tokenize(text[:3000].encode())[:400]
    expected = decode(stock, prefill(stock, tokens), 16)
    assert decode(ours, prefill(ours, tokens), 16) == expected


def test_gemma3_bytes_count_the_windows(load, gemma3):
    full = load(gemma3, n_ctx=8192).kv_stats
    half = load(gemma3, n_ctx=8192, kv_budget="24MiB").kv_stats()
    assert half.bytes <= 24 * 2**20
    assert full().bytes > half.bytes
