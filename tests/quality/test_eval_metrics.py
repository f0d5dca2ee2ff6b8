"""Numbers from the values that tasks record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge.quality.metrics.agreement import agreement, first_difference
from depthkv_edge.quality.metrics.interval import interval
from depthkv_edge.quality.metrics.log_prob import answer_log_prob, log_prob
from depthkv_edge.quality.metrics.rouge import rouge

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)
TOKENS = st.lists(st.integers(0, 3), max_size=20)


@settings(max_examples=25, deadline=None)
@given(VALUES)
def test_interval_contains_the_mean_and_is_the_same_again(values):
    low, high = interval(values)
    assert low <= np.mean(values) <= high
    assert min(values) - 1e-6 <= low and high <= max(values) + 1e-6
    assert interval(values) == (low, high)


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [2.5] * 9])
def test_no_interval_where_nothing_is_known_of_it(values):
    assert interval(values) == (np.mean(values), np.mean(values))


def test_interval_is_as_wide_as_the_spread_says():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 400**0.5, rel=0.2)


def test_interval_of_many_values_is_drawn_in_parts():
    values = np.arange(20_000) % 7
    low, high = interval(values)
    assert low < values.mean() < high < low + 0.1


def test_answer_log_prob():
    log_probs = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert answer_log_prob(log_probs, [0, 2]) == (pytest.approx(np.log(0.35)), True)
    assert answer_log_prob(log_probs, [0, 1]) == (pytest.approx(np.log(0.1)), False)


def test_log_prob_over_all_answers():
    records = [{"log_prob": [-1.0, -3.0], "exact": [True, False]}, {"log_prob": [-5.0], "exact": [False]}]
    numbers = log_prob(records)
    assert numbers["log_prob"] == -3 and numbers["exact"] == pytest.approx(1 / 3) and numbers["n"] == 3
    assert -5 <= numbers["low"] < -3 < numbers["high"] <= -1


def test_agreement():
    assert agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    assert agreement([1, 2, 3, 4], [1, 2]) == agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert agreement([1, 2], [2, 1]) == 0


def test_first_difference():
    assert first_difference([1, 2, 3, 4], [1, 2, 0, 4]) == 2
    assert first_difference([1, 2, 3], [0, 2, 3]) == 0
    assert first_difference([1, 2, 3], [1, 2]) == 2


@given(TOKENS, TOKENS)
def test_agreement_of_any_tokens(a, b):
    assert agreement(a, b) == agreement(b, a)
    assert first_difference(a, b) == first_difference(b, a) <= min(len(a), len(b))
    assert first_difference(a, a) == len(a)
    assert not a or (agreement(a, b) == 1) == (a == b)


def test_rouge():
    found = rouge("the cat sat on the mat", "the cat lay on a mat")  # 4 of 6 words each way, in order
    assert found == {"rouge1": pytest.approx(4 / 6), "rougeL": pytest.approx(4 / 6)}
    assert rouge("one two three four", "four three two one") == {"rouge1": 1.0, "rougeL": 0.25}
    assert rouge("!?", "!?") == {"rouge1": 1.0, "rougeL": 1.0}


@pytest.mark.parametrize("text", ["", "!?", "quite other words"])
def test_rouge_of_disjoint_texts(text):
    assert rouge("The cat sat.", text) == {"rouge1": 0.0, "rougeL": 0.0}


def test_rouge_reads_any_script():
    assert rouge("кошка на ковре", "Кошка на полу")["rouge1"] == pytest.approx(2 / 3)
