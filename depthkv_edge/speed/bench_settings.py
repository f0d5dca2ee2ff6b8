"""What `bench` is asked to measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from depthkv_edge.errors import DepthKVError

TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2, "bf16": 30, "f32": 0}  # enum ggml_type
LEAST_CTX = 512


@dataclass(frozen=True)
class Sizes:
    """How much is computed for one number. The defaults measure; smaller ones only show that everything runs.

    Attributes:
        segment: most prefill tokens of one turn: the batch that every context is created with.
        run: decode tokens of one repetition: as many as a layer frees at once while decoding, so that each repetition
            has its share of eviction.
        turn: decode tokens until the next configuration has its turn; divides `run`.
        prompt: prefill tokens that are worth measuring: a context is filled as often as comes nearest to them, at least
            once and at most once for each repetition.
        pairs: pairs of fresh processes, for each repetition, that compare two builds.
        pair_turns: turns of each process of a pair, in prefill.
        pair_prefill: most tokens of such a turn.
        pair_decode: most tokens that each process of a pair decodes, one in a turn.
        rest: seconds between two turns, in which the threads of the last one stop waiting for more and go to sleep.
    """

    segment: int = 512
    run: int = 64
    turn: int = 8
    prompt: int = 10240
    pairs: int = 2
    pair_turns: int = 16
    pair_prefill: int = 32
    pair_decode: int = 128
    rest: float = 0.02


@dataclass(frozen=True)
class BenchSettings:
    """Configurations and how often they are measured.

    Attributes:
        n_ctx: positions of every context.
        budgets: shares of the full cache, in (0, 1).
        types: of K and V, names of TYPES.
        repetitions: of every measurement, at least.
        n_threads: CPU threads of every context.
    """

    n_ctx: int
    n_threads: int
    budgets: tuple[float, ...] = (0.3, 0.6)
    types: tuple[str, ...] = ("f16",)
    repetitions: int = 5
    sizes: Sizes = Sizes()

    def check(self) -> None:
        """Raises DepthKVError for a value that cannot be measured."""
        if self.n_ctx < LEAST_CTX:
            raise DepthKVError(f"-c {self.n_ctx} is too small to measure anything at depth: give {LEAST_CTX} or more")
        if self.repetitions < 1:
            raise DepthKVError(f"--repetitions {self.repetitions} measures nothing: give 1 or more")
        if self.n_threads < 1:
            raise DepthKVError(f"--threads {self.n_threads} is not above 0: give 1 or more")


def parse_budgets(written: str) -> tuple[float, ...]:
    """Budgets from a list with commas.

    Raises:
        DepthKVError: one is no number or out of range, or is given twice.
    """
    budgets = tuple(_budget(item) for item in _items(written, "--budgets", "0.3,0.6"))
    _refuse_twice(budgets, "budget")
    return budgets


def parse_types(written: str) -> tuple[str, ...]:
    """Types of K and V from a list with commas.

    Raises:
        DepthKVError: one is not known or given twice.
    """
    types = _items(written, "--types", "f16,q8_0")
    for name in types:
        if name not in TYPES:
            raise DepthKVError(f"type {name!r} is not known: give some of {', '.join(TYPES)}")
    _refuse_twice(types, "type")
    return types


def _items(written: str, option: str, example: str) -> tuple[str, ...]:
    items = tuple(item.strip() for item in written.split(","))
    if not all(items):
        raise DepthKVError(f"{option} {written!r} names nothing: give a list such as {example}")
    return items


def _budget(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        raise DepthKVError(f"budget {text!r} is not a number: give fractions such as 0.3,0.6") from None
    if not (math.isfinite(budget) and 0 < budget < 1):
        raise DepthKVError(f"budget {text} is out of range: give fractions of the full cache above 0 and below 1")
    return budget


def _refuse_twice(values: Sequence[float | str], what: str) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise DepthKVError(f"{what} {value} is given twice: give each once")
