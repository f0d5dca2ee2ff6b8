"""The rules that the engine knows, and the numbers that it goes by: from the library, not written twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from depthkv_edge.engine import capi
from depthkv_edge.errors import DepthKVError


@dataclass(frozen=True)
class Rule:
    """A token-scoring rule or an allocation rule.

    Attributes:
        needs_attn: of a token-scoring rule: it judges by attention.
    """

    name: str
    desc: str
    needs_attn: bool


def _rules(get: Callable[..., bool]) -> dict[str, Rule]:
    found: dict[str, Rule] = {}
    raw: Any = capi.llama_depthkv_rule()
    while get(len(found), raw):
        rule = Rule(raw.name.decode(), raw.desc.decode(), raw.needs_attn)
        found[rule.name] = rule
    return found


SCORERS = _rules(capi.llama_depthkv_get_scorer)
ALLOC_RULES = _rules(capi.llama_depthkv_get_alloc)

_constants = capi.llama_depthkv_get_constants()

N_SINK: int = _constants.n_sink
N_RECENT: int = _constants.n_recent
N_ALIGN: int = _constants.n_align
N_UBATCH_MIN: int = _constants.n_ubatch_min
N_QUERY_SPAN: int = _constants.n_query_span
N_WARMUP: int = _constants.n_warmup

# smallest layer that can evict: what is never evicted, and a ubatch
N_CELLS_MIN = N_SINK + N_RECENT + N_UBATCH_MIN


def n_ubatch(n_cells_min: int, most: int = N_QUERY_SPAN) -> int:
    """Tokens of a ubatch, from the cells of the smallest layer; on a CPU at most those of one scoring pass."""
    return capi.llama_depthkv_n_ubatch(n_cells_min, most)


def aligned(n_cells: int) -> int:
    """Cells that the engine makes of so many that are asked for."""
    return -(-n_cells // N_ALIGN) * N_ALIGN


def check_scorer(name: str) -> None:
    """Check the name of a token-scoring rule.

    Raises:
        DepthKVError: there is none.
    """
    if name not in SCORERS:
        raise DepthKVError(f"scorer {name!r} is not known: give one of {', '.join(SCORERS)}")


def check_alloc_rule(name: str) -> None:
    """Check the name of an allocation rule.

    Raises:
        DepthKVError: there is none.
    """
    if name not in ALLOC_RULES:
        raise DepthKVError(f"allocation rule {name!r} is not known: give one of {', '.join(ALLOC_RULES)}")
