"""What users write as a budget, and that what it comes to never exceeds it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthkv_edge import DepthKVError
from depthkv_edge.budget import Auto, Bytes, Fraction, FullCache, Tokens, largest_share, parse_budget

MIB = 2**20


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        (0.6, Fraction(0.6)),
        (1, Fraction(1.0)),
        ("0.6", Fraction(0.6)),
        (".5", Fraction(0.5)),
        ("1e-2", Fraction(0.01)),
        ("60%", Fraction(0.6)),
        (" 12.5 % ", Fraction(0.125)),
        ("96MiB", Bytes(96 * MIB)),
        ("96 mib", Bytes(96 * MIB)),
        ("1.5GiB", Bytes(1536 * MIB)),
        ("512KiB", Bytes(512 * 1024)),
        ("96MB", Bytes(96_000_000)),
        ("4096t", Tokens(4096)),
        ("auto", Auto()),
        ("AUTO", Auto()),
        (Tokens(7), Tokens(7)),
    ],
)
def test_parse(written, budget):
    assert parse_budget(written) == budget


@pytest.mark.parametrize(
    ("written", "part"),
    [
        (0, "not above 0"),
        ("0%", "not above 0"),
        ("0MiB", "not above 0"),
        (1e-60, "not above 0"),
        (-0.5, "not above 0"),
        (float("nan"), "not above 0"),
        ("nan", "not above 0"),
        ("inf", "not above 0"),
        (float("inf"), "not above 0"),
        (1.5, "above the full cache"),
        ("150%", "above the full cache"),
        ("4096", "above the full cache"),
        ("0.5t", "less than one token"),
        ("0.0001KiB", "less than one byte"),
        ("abc", "not understood"),
        ("", "not understood"),
        ("%", "not understood"),
        ("96 MiB more", "not understood"),
        ("9,6", "not understood"),
        (True, "not understood"),
        (None, "not understood"),
    ],
)
def test_refused(written, part):
    with pytest.raises(DepthKVError, match=part) as caught:
        parse_budget(written)
    assert "60%" in str(caught.value), "the message shows the forms"
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_an_error(text):
    try:
        budget = parse_budget(text)
    except DepthKVError:
        return
    full = FullCache(n_ctx=4096, bytes_growing=10**8, bytes_window=0)
    assert isinstance(budget, Auto) or 0 < budget.resolve(full) <= 1


@given(st.floats(min_value=0, max_value=1, exclude_min=True, width=32))
def test_fraction_is_itself(value):
    assert parse_budget(value) == Fraction(value)
    assert parse_budget(repr(value)) == Fraction(value)


@given(part=st.integers(1, 2**40), whole=st.integers(1, 2**40))
def test_share_is_close_and_not_above(part, whole):
    share = largest_share(part, whole)
    assert 0 < share <= 1
    assert share == np.float32(share), "the engine reads 32 bits"
    if part >= whole:
        assert share == 1
    else:
        assert int(share * whole) <= part
        assert share == pytest.approx(part / whole, rel=2**-23)
        if whole < 2**20:
            assert int(share * whole) == part, "not one cell is lost"


@given(
    n_bytes=st.integers(1, 2**36),
    growing=st.integers(1, 2**36),
    window=st.integers(0, 2**30),
)
def test_bytes_are_never_exceeded(n_bytes, growing, window):
    full = FullCache(n_ctx=4096, bytes_growing=growing, bytes_window=window)
    if n_bytes <= window:
        with pytest.raises(DepthKVError, match="sliding-window"):
            Bytes(n_bytes).resolve(full)
        return
    assert window + int(Bytes(n_bytes).resolve(full) * growing) <= n_bytes


@given(n=st.integers(1, 2**20), n_ctx=st.integers(1, 2**20))
def test_tokens_are_never_exceeded(n, n_ctx):
    full = FullCache(n_ctx=n_ctx, bytes_growing=n_ctx * 768, bytes_window=0)
    assert int(Tokens(n).resolve(full) * n_ctx) <= n


def test_round_shares_are_exact():
    full = FullCache(n_ctx=8192, bytes_growing=192 * MIB, bytes_window=0)
    assert Bytes(96 * MIB).resolve(full) == 0.5
    assert Tokens(2048).resolve(full) == 0.25
    assert Bytes(400 * MIB).resolve(full) == 1
