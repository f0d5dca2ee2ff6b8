"""A layer of the engine that a text passes through, against a slow account of the rules written apart from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv_edge.engine.rules import N_CELLS_MIN, N_RECENT, N_SINK, SCORERS, n_ubatch
from depthkv_edge.engine.sim import LayerSim, sampled_queries, simulate
from depthkv_edge.errors import DepthKVError

F = np.float32


def splitmix(layer: int, pos: int) -> float:
    mask = 2**64 - 1
    x = ((layer << 32) + pos + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return (x >> 40) / 2**24


def slow_held(rule: str, layer: int, n_tokens: int, n_cells: int, ubatch: int, mass_of) -> list[tuple[int, list[int]]]:
    """Held positions before each ubatch; a cell is a dictionary, a score one number at a time."""
    cells: dict[int, dict[str, np.float32]] = {}
    ring: list[int] = []
    scored = -1
    history = []
    for start in range(0, n_tokens, ubatch):
        n = min(ubatch, n_tokens - start)
        free = n_cells - len(cells)
        if rule in ("attention", "window") and free < n + (512 if n > 1 else 0):
            queries = sorted(q for q in ring if q > scored)
            due = max(cells, default=-1) - scored >= (128 if n > 1 else 512)
            if queries and (due or (free < n and scored < 0)):
                mass = mass_of(queries, sorted(cells))
                n_seen = queries[-1] - max(scored, 0)
                decay = F(0.5) ** F(n_seen / 256)
                for p, cell in cells.items():
                    if rule == "window":
                        cell["acc"] = mass[p]
                    else:
                        cell["acc"] = decay * cell["acc"] + mass[p]
                        cell["cnt"] = decay * cell["cnt"] + F(sum(q >= p for q in queries))
                scored = queries[-1]
        if free < n:
            last = max(cells)
            ranked = []
            for p in cells:
                if N_SINK <= p < last + 1 - N_RECENT:
                    if rule == "streaming":
                        score = 0.0
                    elif rule == "random":
                        score = splitmix(layer, p)
                    elif rule == "window":
                        near = [cells[q]["acc"] for q in range(p - 3, p + 4) if q in cells]
                        score = max([F(0), *(x for x in near if not math.isnan(x))])
                    else:
                        score = cells[p]["acc"] / cells[p]["cnt"] if cells[p]["cnt"] > 0 else math.inf
                    ranked.append((-math.inf if math.isnan(score) else score, p))
            for _, p in sorted(ranked)[: max(n - free, min(64, n_cells // 32))]:
                del cells[p]
        history.append((start, sorted(cells)))
        for p in range(start, start + n):
            cells[p] = {"acc": F(0), "cnt": F(0)}
        k = 1 if n == 1 else min(32, -(-n // 4))
        for i in range(k):
            ring.append(start + (n - k + i if rule == "window" else (i + 1) * n // k - 1))
        ring = ring[-32:]
    return history


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(sorted(SCORERS)),
    layer=st.integers(0, 90),
    n_tokens=st.integers(1, 1500),
    n_cells=st.integers(N_CELLS_MIN, 700),
    ubatch=st.sampled_from([None, 32, 64, 160]),
    seed=st.integers(0, 2**31),
    broken=st.booleans(),
)
def test_same_cells_as_the_slow_account(rule, layer, n_tokens, n_cells, ubatch, seed, broken):
    ubatch = min(ubatch or n_ubatch(n_cells), n_cells - N_SINK - N_RECENT)
    weight = np.random.default_rng(seed).exponential(size=n_tokens).astype(F)
    weight = np.round(weight * 4) / 4  # equal scores do happen
    if broken:
        weight[::17] = np.nan

    def mass(queries, cells):  # any function of both will do
        return np.array([weight[p] * (1 + (queries[-1] * 7 + p) % 3) for p in cells], F)

    expected = slow_held(
        rule,
        layer,
        n_tokens,
        n_cells,
        ubatch,
        lambda queries, cells: dict(zip(cells, mass(queries, cells), strict=True)),
    )
    found = simulate(rule, layer, n_tokens, n_cells, ubatch, mass)
    assert [(h.start, h.pos.tolist()) for h in found] == expected


def test_first_leaves_out_what_ends_before_it():
    everything = simulate("streaming", 0, 600, 100, 32, None)
    assert [h.start for h in everything if h.start + 32 > 500] == [
        h.start for h in simulate("streaming", 0, 600, 100, 32, None, first=500)
    ]


def test_what_cannot_be():
    with pytest.raises(DepthKVError, match="unknown scorer 'magic': use one of attention, window"):
        LayerSim("magic", 0, 100)
    with pytest.raises(DepthKVError, match="unknown scorer 'magic'"):
        sampled_queries("magic", 100, 32)
    with pytest.raises(DepthKVError, match="layer capacity 36 has no room beside 4 sinks \\+ 32 recent"):
        LayerSim("attention", 0, 36)
    with pytest.raises(ValueError, match="attention of"):
        LayerSim("attention", 0, 100).count(np.zeros(3, F))
