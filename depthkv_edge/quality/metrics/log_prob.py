"""Log-probability of the right answer, teacher-forced, beside exact match: small models miss by a digit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthkv_edge.quality.metrics.interval import interval
from depthkv_edge.quality.store import Record


def answer_log_prob(log_probs: np.ndarray, answer: Sequence[int]) -> tuple[float, bool]:
    """How likely an answer is.

    Args:
        log_probs: [n, n_vocab] of each token of the answer, those before it given.
        answer: [n] tokens.

    Returns:
        The answer's log-probability in nats, and whether each of its tokens is the most likely one.
    """
    chosen = log_probs[np.arange(len(answer)), answer]
    return float(chosen.sum(dtype=np.float64)), bool((log_probs.argmax(axis=1) == answer).all())


def log_prob(records: Sequence[Record]) -> Record:
    """Mean over the answers of all records.

    Args:
        records: each with `log_prob` and `exact`, a list of one value for each answer.

    Returns:
        log_prob; low, high: its 95 % bootstrap interval over answers; exact: share of the answers; n answers.
    """
    values = [value for record in records for value in record["log_prob"]]
    exact = [value for record in records for value in record["exact"]]
    low, high = interval(values)
    return {
        "log_prob": float(np.mean(values)),
        "low": low,
        "high": high,
        "exact": float(np.mean(exact)),
        "n": len(values),
    }
