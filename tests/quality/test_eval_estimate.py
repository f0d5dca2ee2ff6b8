"""How long an evaluation will take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from depthkv_edge.quality import estimate
from depthkv_edge.quality.texts import Text


@dataclass
class Machine:
    """A stream, and the model: a token takes `token` seconds, and `earlier` more for each one before it."""

    token: float
    earlier: float
    past: list[int] = field(default_factory=list)
    last_seconds: float = 0.0

    def feed(self, tokens: list[int]) -> None:
        self.last_seconds = sum(self.token + self.earlier * (len(self.past) + i) for i in range(len(tokens)))
        self.past += tokens

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())[::4]

    @contextlib.contextmanager
    def open(self, model: Machine, n_ctx: int) -> Iterator[Machine]:
        yield self
        assert len(self.past) <= n_ctx


@pytest.mark.parametrize("n_ctx", [256, 1000, 4096, 32768])
@pytest.mark.parametrize("earlier", [0.0, 1e-6, 1e-4])
def test_a_straight_line_is_found(monkeypatch, n_ctx, earlier):
    machine = Machine(0.01, earlier)
    monkeypatch.setattr(estimate, "Row", lambda method: machine)
    seconds = 1 / estimate.tokens_per_second(machine, Text("short", "some text"), n_ctx)
    assert seconds == pytest.approx(0.01 + earlier * n_ctx / 2, rel=0.01, abs=earlier * 200)
