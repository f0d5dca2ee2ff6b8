"""ROUGE-1 and ROUGE-L, F-measure: words, and the longest common subsequence of words (Lin 2004, W04-1013)."""

from __future__ import annotations

import re

TYPES = ("rouge1", "rougeL")


class _Words:
    """Words of any script: the package's own tokenizer knows a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def rouge(reference: str, text: str) -> dict[str, float]:
    """F-measures in [0, 1] of a text against a reference, without stemming; 1 for the same text, even without words."""
    if reference == text:
        return dict.fromkeys(TYPES, 1.0)
    from rouge_score.rouge_scorer import RougeScorer  # takes a second, and nothing else here needs it

    scores = RougeScorer(TYPES, tokenizer=_Words()).score(reference, text)
    return {name: float(scores[name].fmeasure) for name in TYPES}
