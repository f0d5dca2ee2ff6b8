"""Exact match and F1 of short answers, as SQuAD scores them (arXiv 1606.05250), paired with the full cache's."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from depthkv_edge.quality.metrics.interval import interval
from depthkv_edge.quality.store import Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(given: str, answers: Sequence[str]) -> bool:
    """Is it one of the answers, apart from case, punctuation, articles and spaces?"""
    return any(_words(given) == _words(answer) for answer in answers)


def f1(given: str, answers: Sequence[str]) -> float:
    """F-measure of the words that it shares with an answer, of the answer where that is highest."""
    return max(_f1(_words(given), _words(answer)) for answer in answers)


def answers(records: Sequence[Record], reference: Sequence[Record]) -> Record:
    """Means over all questions; the intervals are over documents, whose questions share what was forgotten.

    Args:
        records: of each document `exact`, `f1` and `log_prob` (nats, of the first right answer): a value a question.
        reference: the same of the full cache.

    Returns:
        exact, f1, log_prob: means; f1_share: of the full cache's F1; exact_change, f1_change, log_prob_change: mean
        difference from the full cache's, each with its 95 % bootstrap interval in `..._low`, `..._high`; n questions;
        documents.
    """
    found: Record = {}
    for name in ("exact", "f1", "log_prob"):
        found[name] = _mean(records, name)
        pairs = list(zip(records, reference, strict=True))
        of_document = [float(np.mean(np.subtract(a[name], b[name], dtype=float))) for a, b in pairs]
        found[f"{name}_change"] = found[name] - _mean(reference, name)
        found[f"{name}_change_low"], found[f"{name}_change_high"] = interval(of_document)
    whole = _mean(reference, "f1")
    found["f1_share"] = found["f1"] / whole if whole else 1.0
    return found | {"n": sum(len(record["f1"]) for record in records), "documents": len(records)}


def _mean(records: Sequence[Record], name: str) -> float:
    return float(np.mean([float(value) for record in records for value in record[name]]))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(given: Sequence[str], answer: Sequence[str]) -> float:
    if not given or not answer:
        return float(given == answer)
    common = sum((Counter(given) & Counter(answer)).values())
    return 2 * common / (len(given) + len(answer))
