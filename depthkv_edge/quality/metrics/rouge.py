"""ROUGE-1 and ROUGE-L, F-measure: words, and the longest common subsequence of words (Lin 2004, W04-1013)."""

from __future__ import annotations

import re
from collections import Counter

from rapidfuzz.distance import LCSseq

TYPES = ("rouge1", "rougeL")


def rouge(reference: str, text: str) -> dict[str, float]:
    """F-measures in [0, 1] of a text against a reference, without stemming; 1 for the same text, even without words."""
    if reference == text:
        return dict.fromkeys(TYPES, 1.0)
    # words of any script
    a, b = (re.findall(r"\w+", words.lower()) for words in (reference, text))
    common = {"rouge1": (Counter(a) & Counter(b)).total(), "rougeL": LCSseq.similarity(a, b)}
    return {name: 2 * common[name] / max(1, len(a) + len(b)) for name in TYPES}
