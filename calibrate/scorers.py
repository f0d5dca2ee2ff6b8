"""The catalogue of token-scoring rules, one line each."""

from __future__ import annotations

from depthkv_edge.calibrate.score_attention import ATTENTION
from depthkv_edge.calibrate.score_random import RANDOM
from depthkv_edge.calibrate.score_streaming import STREAMING
from depthkv_edge.calibrate.score_window import WINDOW
from depthkv_edge.calibrate.scorer import Scorer
from depthkv_edge.errors import DepthKVError

SCORERS = {scorer.name: scorer for scorer in (ATTENTION, WINDOW, STREAMING, RANDOM)}


def get_scorer(name: str) -> Scorer:
    """A rule by its name in the engine.

    Raises:
        DepthKVError: there is none.
    """
    try:
        return SCORERS[name]
    except KeyError:
        raise DepthKVError(f"unknown scorer '{name}': use one of {', '.join(SCORERS)}") from None
