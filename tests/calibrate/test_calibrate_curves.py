"""From windows to curves: averages, errors, never rising with the keep ratio."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from depthkv_edge.calibrate.curves import (
    _falling,
    _spearman,
    build_curves,
    curve_correlation,
    layer_correlation,
    stability,
)
from depthkv_edge.calibrate.heldout import DEFAULT_RULE, HeldOut
from depthkv_edge.calibrate.layer_cells import allocate
from depthkv_edge.engine import capi

MEASURED = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(0, 10, allow_subnormal=False),
)


@given(MEASURED)
def test_a_file_may_carry_the_curves(measured):
    curves = build_curves(measured, range(len(measured)))
    assert curves.sensitivity.shape == curves.sensitivity_se.shape == measured.shape[1:]
    assert (np.diff(curves.sensitivity, axis=1) <= 0).all()
    for values in (curves.sensitivity, curves.sensitivity_se):
        assert np.isfinite(values).all() and (values >= 0).all()


@given(MEASURED)
def test_one_window_that_falls_is_itself(measured):
    falling = -np.sort(-measured[:1], axis=2)
    curves = build_curves(falling, [0])
    np.testing.assert_allclose(curves.sensitivity, falling[0], rtol=1e-5, atol=1e-6)


def test_windows_count_the_same():
    """A window that loses a hundred times as much has no more to say, nor has one that loses nothing."""
    quiet, loud = np.array([[4.0, 2.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [4.0, 4.0]])
    curves = build_curves(np.stack([quiet, 100 * loud, 0 * quiet]), [0, 1, 0])
    np.testing.assert_allclose(curves.sensitivity, 10 * (quiet + loud) / 2)


def test_what_rises_is_levelled_at_its_mean():
    curves = build_curves(np.array([[[3.0, 1.0, 2.0, 0.5]]]), [0])
    np.testing.assert_allclose(curves.sensitivity, [[3, 1.5, 1.5, 0.5]])


def test_standard_error_over_windows():
    measured = np.array([[[1.0], [3.0]], [[2.0], [2.0]], [[3.0], [1.0]]])
    curves = build_curves(measured, [0, 1, 0])
    np.testing.assert_allclose(curves.sensitivity, [[2], [2]], rtol=1e-6)
    np.testing.assert_allclose(curves.sensitivity_se, [[1 / 3**0.5], [1 / 3**0.5]], rtol=1e-6)


def test_stability_compares_texts():
    up, down = np.arange(5.0)[:, None] + np.zeros((5, 2)), np.arange(5.0)[::-1, None] + np.zeros((5, 2))
    assert stability(np.stack([up, 2 * up]), [0, 1]) == pytest.approx(1)
    assert stability(np.stack([up, down]), [0, 1]) == pytest.approx(-1)
    assert stability(np.stack([up, down, up, down]), [0, 0, 1, 1]) != pytest.approx(-1)  # texts, not windows
    assert stability(np.stack([up, down]), [0, 0]) == pytest.approx(-1)  # one text: its windows
    assert np.isnan(stability(up[None], [0]))


def test_correlations_of_what_does_not_vary():
    flat, up = np.zeros((4, 2)), np.arange(8.0).reshape(4, 2)
    assert np.isnan(layer_correlation(flat, up)) and np.isnan(curve_correlation(flat, up))
    assert layer_correlation(up, up) == curve_correlation(up, up) == pytest.approx(1)


@pytest.mark.parametrize(
    ("uniform", "calibrated", "gain", "rule"),
    [(0.2, 0.1, 2.0, "optimal"), (0.1, 0.1, 1.0, "uniform"), (0.1, 0.4, 0.25, "uniform"), (0.0, 0.0, 1.0, "uniform")],
)
def test_no_gain_asks_for_uniform(uniform, calibrated, gain, rule):
    held_out = HeldOut(uniform, calibrated)
    assert (held_out.gain, held_out.rule) == (pytest.approx(gain), rule)


@pytest.mark.parametrize(("recall", "rule"), [(None, "optimal"), ((4.0, 4.2), "optimal"), ((4.0, 4.5), "uniform")])
def test_what_forgets_more_facts_asks_for_uniform(recall, rule):
    """However much is gained on text; a few answers cannot tell a tenth."""
    assert HeldOut(0.2, 0.1, recall).rule == rule


def test_held_out_windows_are_averaged():
    found = HeldOut.of([[0.2, 0.1], [0.4, 0.2]], [[3.0, 1.0]])
    assert found.values == pytest.approx((0.3, 0.15, 3.0, 1.0))
    assert HeldOut.of([[0.2, 0.1]], []).recall is None


@given(arrays(np.float64, st.integers(2, 12), elements=st.integers(0, 5)), st.integers(0, 100))
def test_the_same_as_scipy(values, seed):
    """Ties included."""
    np.testing.assert_allclose(_falling(values), isotonic_regression(values, increasing=False).x, atol=1e-12)
    other = np.random.default_rng(seed).permutation(values)
    if np.ptp(values) > 0:
        assert _spearman(values, other) == pytest.approx(spearmanr(values, other).statistic, abs=1e-12)


def test_the_rule_that_is_checked_is_the_engines_default():
    loss = np.float32([[2, 1, 0.5], [0.1, 0.01, 0.001], [1, 0.1, 0.01], [0.3, 0.2, 0.1]])
    options = dict(keep_ratios=(0.1, 0.2, 0.4), sensitivity=loss, n_floor=68, n_align=32)
    assert allocate(DEFAULT_RULE, 2048, options["keep_ratios"], loss).cells == tuple(
        capi.alloc(0.4, 4, 2048, **options)
    )
