"""Numbers and models that the engine would crash on, or take for others, are refused by name.

Those of the command line are in tests/cli/test_cli_errors.py.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import write_llama

from depthkv_edge import DepthKVError, Llama
from depthkv_edge.checks import INT32_MAX, check_number, check_threads, default_threads

OUTSIDE = st.one_of(
    st.integers(max_value=-2),
    st.integers(min_value=INT32_MAX + 1),
    st.floats(),
    st.none(),
    st.text(max_size=3),
    st.just(Fraction(1, 2)),
)


@given(st.integers(), st.integers(-10, 10), st.integers(0, 10))
def test_a_number_in_a_range(value, least, width):
    if least <= value <= least + width:
        assert check_number("n", value, least, least + width) == value
    else:
        with pytest.raises(DepthKVError, match=rf"^n .* is out of range: give {least} to {least + width}$"):
            check_number("n", value, least, least + width)


def test_numbers_of_numpy_are_numbers():
    assert check_number("n", np.int64(3)) == 3 and check_number("n", np.uint8(3)) == 3


@given(OUTSIDE)
def test_threads(value):
    with pytest.raises(DepthKVError, match="^n_threads "):
        check_threads("n_threads", value)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.5, "0.5 is not a whole number"),
        ("4", "'4' is not a whole number"),
        (0, "0 is out of range"),
        (-1, "-1 is out of range"),
        (65, "65 is far above the 2 cores of this machine"),
        (10**19, f"{10**19} is far above the 2 cores of this machine"),
        (10**40, "of more than 30 digits is far above the 2 cores of this machine"),
    ],
)
def test_how_many_threads_there_may_be(monkeypatch, value, why):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(DepthKVError, match=rf"^n_threads {why}: give 1 to 64$"):
        check_threads("n_threads", value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("tiny") / "m.gguf")


def test_more_cores_than_the_engine_has_room_for(monkeypatch, tiny):
    monkeypatch.setattr("os.cpu_count", lambda: 1100)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 1100)
    assert check_threads("--threads", default_threads()) == 512
    for threads, n in (({}, 512), ({"n_threads": None, "n_threads_batch": 0}, 512), ({"n_threads": 3}, 3)):
        llama = Llama(tiny, n_ctx=64, verbose=False, **threads)
        llama.close()
        assert (llama.context_params.n_threads, llama.context_params.n_threads_batch) == (n, 512)


@pytest.fixture(scope="module")
def llama(tiny):
    with_budget = Llama(tiny, n_ctx=256, kv_budget=0.5, verbose=False)
    yield with_budget
    with_budget.close()


@given(value=OUTSIDE)
def test_what_no_position_layer_or_sequence_is(llama, value):
    before = llama.kv_stats()
    for call in (
        lambda: llama.pin(value, 8),
        lambda: llama.pin(0, value),
        lambda: llama.pin(0, 8, seq_id=value),
        lambda: llama.unpin(seq_id=value),
        lambda: llama.kv_positions(value),
        lambda: llama.kv_positions(0, seq_id=value),
        lambda: llama.kv_stats(seq_id=value),
    ):
        with pytest.raises(DepthKVError):
            call()
    assert llama.kv_stats() == before


@given(layer=st.integers(0, INT32_MAX))
def test_layers(llama, layer):
    n_layers = len(llama.kv_stats().layers)
    if layer < n_layers:
        assert llama.kv_positions(layer) == []
    else:
        with pytest.raises(DepthKVError, match=f"layer index {layer} is out of range: {n_layers} layers"):
            llama.kv_positions(layer)


@pytest.mark.parametrize("name", ["n_ctx", "n_batch", "n_ubatch", "n_sink", "n_recent", "n_threads", "type_k"])
@given(
    value=st.one_of(
        st.integers(max_value=-1),
        st.integers(min_value=INT32_MAX + 1),
        st.just(0.5),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        st.just("512"),
    )
)
def test_arguments(tiny, name, value):
    with pytest.raises(DepthKVError, match=name):
        Llama(tiny, verbose=False, **{name: value})


def test_arguments_that_have_to_be_there(tiny):
    """The base class has no other meaning for None than for a number."""
    for name in ("n_ctx", "n_batch", "n_ubatch"):
        with pytest.raises(DepthKVError, match=f"{name} None is not a whole number"):
            Llama(tiny, verbose=False, **{name: None})


def test_types_that_no_cache_has(tiny):
    for value in (4, 9, 31, 999):
        with pytest.raises(DepthKVError, match=f"type_v {value} is no type of a KV cache"):
            Llama(tiny, type_v=value, verbose=False)


def test_a_model_that_has_been_closed(smollm2):
    llama = Llama(smollm2, n_ctx=256, kv_budget=0.5, verbose=False)
    llama.close()
    llama.close()
    for call in (
        llama.kv_stats,
        lambda: llama.kv_positions(0),
        lambda: llama.pin(0, 4),
        llama.unpin,
        llama.n_ctx,
        llama.n_vocab,
        llama.token_eos,
        lambda: llama.ctx,
        lambda: llama.tokenize(b"Hello"),
        lambda: llama.detokenize([1]),
        lambda: llama.eval([1]),
        lambda: llama("Hello"),
        lambda: llama.create_chat_completion([{"role": "user", "content": "Hello"}]),
        llama.save_state,
    ):
        with pytest.raises(DepthKVError, match=r"\.gguf has been closed: load it again"):
            call()


def test_no_model():
    with pytest.raises(DepthKVError, match="no model is named"):
        Llama("")
