"""Ours as the product runs: in the engine on F32 weights, with cells that are allocated once and never grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.plan import BOUNDED, FULL, Item, Plan, Retrieval, Window, record_key
from benchmarks.peers.score import ask, score_tail
from depthkv_edge.engine.model import Model
from depthkv_edge.engine.stream import Stream
from depthkv_edge.measure.progress import LongWork
from depthkv_edge.quality.rows import Row, build_rows
from depthkv_edge.quality.store import Record, Store

METHODS = ("depth", "uniform", "streaming")

_CHUNK = 256  # tokens predicted at once


def budgets(item: Item, ratio: float) -> tuple[float, ...]:
    """Budgets of the engine that are set beside a keep ratio of the prompt.

    The first has the cells that the other regimes end with: `ratio` of the prompt, and what follows it. The second, of
    running text only, never has more than `ratio` of everything; a question is too short for the two to differ.
    """
    same = (ratio * item.n_prompt + item.n_tail) / context(item)
    return (same, ratio) if isinstance(item, Window) else (same,)


def context(item: Item) -> int:
    """Tokens of the engine's context: it takes multiples of 256."""
    return -(-(item.n_prompt + item.n_tail) // 256) * 256


def measure(model: Model, calibrated: Path, plan: Plan, store: Store) -> None:
    """Everything that is not in the store yet.

    Args:
        calibrated: the file that the model's calibration is read from.

    Raises:
        DepthKVError: the engine refuses a budget.
    """
    todo = [(item, _missing_rows(model, calibrated, plan, item, store)) for item in plan.items]
    todo = [(item, rows) for item, rows in todo if rows]
    with LongWork() as watcher:
        watcher.begin(sum((1 + len(rows)) * context(item) for item, rows in todo))
        for item, rows in todo:
            watcher.title(f"ours, bounded: {item.text}")
            reference = None
            for row in (Row(FULL), *rows):
                with row.open(model, context(item)) as stream:
                    stream.feed(item.prompt)
                    record: Record = {"cells": _cells(stream)}
                    if isinstance(item, Window):
                        logits = _predict(stream, item.tail)
                        reference = logits if reference is None else reference
                        record |= score_tail(reference, logits, item.tail)
                    else:
                        record |= _ask(stream, item)
                store[_key(item, row)] = record
                watcher.advance(context(item))


def _missing_rows(model: Model, calibrated: Path, plan: Plan, item: Item, store: Store) -> list[Row]:
    shares = sorted({budget for ratio in plan.ratios for budget in budgets(item, ratio) if budget < 1})
    rows = build_rows(model, calibrated, METHODS, shares, context(item), seed=0)
    return [row for row in rows if row.method in METHODS and _key(item, row) not in store]


def _key(item: Item, row: Row) -> str:
    return record_key(item, BOUNDED, row.method, 1.0 if row.budget is None else row.budget)


def _cells(stream: Stream) -> Record:
    """As `one_pass_cells` says it; what is allocated does not change."""
    occupancy = stream.occupancy()
    allocated = sum(occupancy.cells)
    return {"held": list(occupancy.held), "peak": allocated, "prompt": allocated, "end": allocated}


def _predict(stream: Stream, tokens: list[int]) -> torch.Tensor:
    parts = [stream.predict(tokens[at : at + _CHUNK]).copy() for at in range(0, len(tokens), _CHUNK)]
    return torch.from_numpy(np.concatenate(parts))


def _ask(stream: Stream, item: Retrieval) -> Record:
    state = stream.save()

    def predict(tokens: Sequence[int]) -> torch.Tensor:
        stream.restore(state)
        return torch.from_numpy(stream.predict(tokens))

    return ask(item, predict)
