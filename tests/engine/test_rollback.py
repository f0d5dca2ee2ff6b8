"""Going back: what comes next is what it would be had the context never been elsewhere."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthkv_edge import DepthKVError

NEAR = dict(n_ctx=512, n_batch=256, n_ubatch=256, kv_budget=0.4)


def answer(llama, tokens, n=24, **kwargs):
    return list(islice(llama.generate(tokens, **({"temp": 0.0} | kwargs)), n))


def held(llama):
    return [llama.kv_positions(i) for i in range(len(llama.kv_stats().layers))]


@pytest.mark.parametrize("n", [298, 75])
def test_the_front_of_an_old_prompt(load, tokens, n):
    llama, fresh = load(**NEAR), load(**NEAR)
    answer(llama, tokens[:420], 60)
    assert llama.kv_stats().n_evict > 0
    assert answer(llama, tokens[:n]) == answer(fresh, tokens[:n])
    assert held(llama) == held(fresh)


def test_an_edited_message_of_a_chat(load, text):
    system = "Answer in one short sentence."
    turns = ["note: my dog is called Rex", f"{text[:2400]}\n\nWhat is this text about?", "And what else?"]
    llama, fresh = (load(**NEAR | {"n_ctx": 1024}) for _ in range(2))

    def ask(llama, messages, n):
        told = [{"role": "system", "content": system}, *messages]
        done = llama.create_chat_completion(messages=told, max_tokens=n, temperature=0.0)
        return done["choices"][0]["message"]["content"]

    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": ask(llama, messages, 32)})
    assert llama.kv_stats().n_evict > 0
    edited = [*messages[:2], {"role": "user", "content": "What is my dog called?"}]
    reply = ask(llama, edited, 24)
    assert "Rex" in reply
    assert reply == ask(fresh, edited, 24)


@pytest.mark.parametrize("n, options", [(150, {"temp": 0.0}), (420, {"temp": 0.9, "top_k": 40})])
def test_equal_calls_give_equal_text(load, tokens, options, n):
    llama = load(**NEAR)

    def call():
        llama.set_seed(7)
        return answer(llama, tokens[:n], 70, **options)

    first = call()
    assert [call() for _ in range(2)] == [first, first]
    answer(llama, tokens[2000:2300], 10)
    assert call() == first


def test_what_fits_is_computed_once(load, tokens):
    llama = load(**NEAR)
    history = list(tokens[:60])
    for turn in range(4):
        reply = answer(llama, history, 10)
        history += [*reply, *tokens[300 + 10 * turn : 310 + 10 * turn]]
    assert answer(llama, history[:-30], 10)
    stats = llama.kv_stats()
    assert stats.n_evict == stats.n_reeval == 0


def test_a_conversation_that_only_grows_is_computed_once(load, tokens):
    llama = load(**NEAR)
    history = []
    for turn in range(5):
        history += tokens[turn * 80 : turn * 80 + 80]
        history += answer(llama, history, 10)
    stats = llama.kv_stats()
    assert stats.n_evict > 0 and stats.n_reeval == 0


def test_rollback(load, tokens):
    llama = load(**NEAR)
    llama.eval(tokens[:150])
    assert llama.rollback(120) == 120 == llama.n_tokens
    llama.eval(tokens[120:420])
    before = held(llama)
    assert not llama._ctx.kv_cache_seq_rm(0, 300, -1), "some of what came before 300 is gone"
    assert held(llama) == before
    left = llama.rollback(300)
    assert left < 300 and llama.kv_stats().n_reeval == 300 - left
    llama.eval(tokens[left:300])
    fresh = load(**NEAR)
    fresh.eval(tokens[:300])
    assert held(llama) == held(fresh)


def test_n_tokens_set_back_by_hand(load, tokens):
    llama, fresh = load(**NEAR), load(**NEAR)
    llama.eval(tokens[:420])
    llama.n_tokens = 300
    llama.eval(tokens[1000:1040])
    fresh.eval([*tokens[:300], *tokens[1000:1040]])
    assert llama.n_tokens == fresh.n_tokens == 340
    assert held(llama) == held(fresh)
    assert llama.input_ids[:340].tolist() == [*tokens[:300], *tokens[1000:1040]]


def test_pins_outlive_a_rollback(load, tokens):
    llama = load(**NEAR)
    llama.pin(100, 140)
    llama.eval(tokens[:420])
    llama.n_tokens = 350
    llama.eval(tokens[350:420])
    assert llama.kv_stats().n_reeval > 0
    assert all(set(range(100, 140)) <= set(layer) for layer in held(llama))


def test_positions_that_are_not_there(load, tokens):
    llama = load(**NEAR)
    llama.eval(tokens[:10])
    for n in (11, -1, 2**40, 0.5, "3"):
        with pytest.raises(DepthKVError, match="n_tokens"):
            llama.rollback(n)
    llama.close()
    with pytest.raises(DepthKVError, match="closed"):
        llama.rollback(0)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_calls_answer_as_if_fresh(load, tokens, data):
    """Whatever was asked before, a prompt that has to go back gets the cells of a fresh evaluation."""
    options = dict(n_ctx=512, n_batch=128, n_ubatch=64, kv_budget=data.draw(st.sampled_from([0.3, 0.5])))
    llama = load(**options)
    for _ in range(data.draw(st.integers(1, 3))):
        start, n = data.draw(st.integers(0, 50)), data.draw(st.integers(20, 300))
        answer(llama, [*tokens[:start], *tokens[100 + start : 100 + n]], data.draw(st.integers(1, 30)))
    n = data.draw(st.integers(10, 300))
    n_reeval = llama.kv_stats().n_reeval
    reply = answer(llama, tokens[:n], 20)
    if llama.kv_stats().n_reeval > n_reeval and llama.kv_stats().n_evict > 0:
        fresh = load(**options)
        assert reply == answer(fresh, tokens[:n], 20)
        fresh.close()
    llama.close()
