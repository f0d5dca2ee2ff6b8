"""The native allocator under random curves: what every rule promises, whatever was measured.

Hand-computed cells are in test_calibrated.py and native/tests/test-kv-alloc.cpp, errors in the latter.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthkv_edge.engine import capi
from depthkv_edge.engine.rules import ALLOC_RULES

N_CTX, ALIGN = 4096, 32
RATIOS = (0.1, 0.2, 0.4, 0.7)
RULES = ("proportional", "optimal")

# losses span orders of magnitude, as those of real layers do; flat curves and zeros included
losses = st.lists(st.floats(-25, 3, width=32).map(np.exp) | st.just(0.0), min_size=4, max_size=4)
curves = st.lists(losses.map(lambda row: sorted(row, reverse=True)), min_size=1, max_size=40).map(
    lambda rows: np.array(rows, np.float32)
)
budgets = st.floats(0.05, 1.0)


def cells_of(rule: str, budget: float, loss: np.ndarray, n_floor: int = 1) -> np.ndarray:
    curves = {"keep_ratios": RATIOS, "sensitivity": loss}
    return np.array(capi.alloc(budget, len(loss), N_CTX, rule=rule, **curves, n_floor=n_floor, n_align=ALIGN))


@pytest.mark.parametrize("rule", ALLOC_RULES)
@given(loss=curves, budget=budgets, floor_share=st.floats(0, 1))
def test_within_budget_floor_and_ceiling(rule, loss, budget, floor_share):
    floor = int(floor_share * budget * N_CTX) // ALIGN * ALIGN
    cells = cells_of(rule, budget, loss, floor)
    target = budget * N_CTX * len(loss)
    assert cells.sum() <= target + 1e-6 * N_CTX * len(loss)
    assert cells.sum() > target - ALIGN  # nothing is left over that one more step could use
    assert cells.min() >= floor
    assert cells.max() <= N_CTX
    assert (cells % ALIGN == 0).all()


@pytest.mark.parametrize("rule", ALLOC_RULES)
@given(loss=curves, first=budgets, second=budgets)
def test_more_budget_takes_no_cell_away(rule, loss, first, second):
    less, more = (cells_of(rule, budget, loss) for budget in sorted((first, second)))
    assert (less <= more).all()


@pytest.mark.parametrize("rule", RULES)
@given(loss=curves, budget=budgets, seed=st.integers(0, 2**32 - 1))
def test_order_of_layers_does_not_matter(rule, loss, budget, seed):
    order = np.random.default_rng(seed).permutation(len(loss))
    cells, permuted = cells_of(rule, budget, loss), cells_of(rule, budget, loss[order])
    # layers that gain the same may trade the last step, and nothing else may change
    assert sorted(cells) == sorted(permuted)
    assert np.abs(cells[order] - permuted).max() <= ALIGN


@pytest.mark.parametrize("rule", RULES)
@given(loss=curves, budget=budgets, factor=st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_unit_of_loss_does_not_matter(rule, loss, budget, factor):
    assert (cells_of(rule, budget, loss) == cells_of(rule, budget, loss * np.float32(factor))).all()


@pytest.mark.parametrize("rule", RULES)
@given(loss=curves, budget=budgets)
def test_more_sensitive_layer_gets_no_less(rule, loss, budget):
    doubled = np.concatenate([loss, 4 * loss])
    cells = cells_of(rule, budget, doubled)
    assert (cells[: len(loss)] <= cells[len(loss) :] + ALIGN).all()
