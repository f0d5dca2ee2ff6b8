"""What users write as a budget, and that what it comes to never exceeds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import write_llama

from depthkv_edge import DepthKVError
from depthkv_edge.engine.budget import AUTO, BYTES, FRACTION, TOKENS, parse_budget
from depthkv_edge.engine.context import Options, load_without_weights, plan_context

MIB = 2**20
N_CTX, LAYERS, CELL_BYTES = 4096, 2, 2 * 2 * 64  # K and V, F16


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        (0.6, FRACTION, np.float32(0.6)),
        (1, FRACTION, 1),
        (np.float32(0.25), FRACTION, 0.25),
        (" 12.5 % ", FRACTION, 0.125),
        ("96MiB", BYTES, 96 * MIB),
        ("4096t", TOKENS, 4096),
        ("AUTO", AUTO, 0),
        (parse_budget("7t"), TOKENS, 7),
    ],
)
def test_parse(written, kind, value):
    """All forms are in native/tests/test-kv-budget.cpp; here what arrives there."""
    budget = parse_budget(written)
    assert (budget.kind, budget.value) == (kind, value)


WRONG = (0, -0.5, float("nan"), float("inf"), 1.5, "", "abc", "9,6", "96 MiB more", True, None, "0.5\0", "0.5\n0.6")


@pytest.mark.parametrize("written", [*WRONG, "1" * 999])
def test_refused(written):
    with pytest.raises(DepthKVError, match="KV budget") as caught:
        parse_budget(written)
    assert "60%" in str(caught.value), "the message shows the forms"
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_an_error(text):
    try:
        budget = parse_budget(text)
    except DepthKVError:
        return
    assert budget.is_auto or budget.value > 0


@given(st.floats(min_value=0, max_value=1, exclude_min=True, width=32))
def test_fraction_is_itself(value):
    assert parse_budget(value).value == parse_budget(repr(value)).value == value


# what it comes to


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load_without_weights(write_llama(tmp_path_factory.mktemp("tiny") / "m.gguf")) as loaded:
        yield loaded


def planned(model, budget: str):
    return plan_context(model, Options(n_ctx=N_CTX, budget=budget)).kv


@settings(deadline=None)
@given(n=st.integers(1, 2 * N_CTX))
def test_tokens_are_never_exceeded(model, n):
    try:
        kv = planned(model, f"{n}t")
    except DepthKVError as error:
        assert n < 96 and "below the floor" in str(error)
        return
    cells = [layer.cells for layer in kv.layers]
    if n >= N_CTX:
        assert not kv.active
    else:
        assert n - 32 < sum(cells) / LAYERS <= n
        assert kv.budget == pytest.approx(n / N_CTX)


@settings(deadline=None)
@given(n_bytes=st.integers(1, 2 * N_CTX * LAYERS * CELL_BYTES))
def test_bytes_are_never_exceeded(model, n_bytes):
    try:
        kv = planned(model, f"{n_bytes}e-3kB")
    except DepthKVError as error:
        assert n_bytes < 96 * LAYERS * CELL_BYTES and "below the floor" in str(error)
        return
    assert kv.bytes <= n_bytes
    assert kv.bytes == kv.bytes_full or kv.bytes > n_bytes - 32 * LAYERS * CELL_BYTES


def test_round_shares_are_exact(model):
    assert planned(model, "1024t").budget == 0.25
    assert planned(model, f"{N_CTX * LAYERS * CELL_BYTES // 1024 // 2}KiB").budget == 0.5
    assert planned(model, "400MiB").budget == 1


def test_a_given_path_is_named(tmp_path: Path):
    with pytest.raises(DepthKVError, match="none.gguf"), load_without_weights(tmp_path / "none.gguf"):
        pass
