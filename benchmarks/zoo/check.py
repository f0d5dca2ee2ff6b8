"""What of a shape works: contexts of all its layers, what a chat does on a few of them, commands that read a file."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.shapes import Shape
from benchmarks.zoo.write import PROGRAMS, write_model
from depthkv_edge.engine.budget import parse_budget
from depthkv_edge.engine.context import Options, load_without_weights, plan_context
from depthkv_edge.errors import DepthKVError
from depthkv_edge.sizing.diagnosis import diagnose
from depthkv_edge.sizing.inspection import inspect_model

# maybe of another build, under a sanitizer
_RUN = Path(os.environ.get("DEPTHKV_TEST_PROGRAMS", PROGRAMS)) / "depth-zoo-run"


@dataclass(frozen=True)
class Attempt:
    """One combination of attention and types.

    Attributes:
        flash_attn: "auto", "disabled" or "enabled".
        type_k: of the K cache, as ggml names it.
        type_v: of the V cache.
        shifted: whether the context could shift.
        result: "ok", or what went wrong.
    """

    flash_attn: str
    type_k: str
    type_v: str
    shifted: bool
    result: str


@dataclass(frozen=True)
class Check:
    """What became of a shape.

    Attributes:
        created: contexts of all layers, without weights.
        ran: what a chat does on `shape.n_layers_run` layers, see native/tests/depth-zoo-run.cpp.
        doctor: what `doctor` refuses; empty if nothing.
        n_layers_budget: layers whose cells grow with the context, as `inspect` says.
    """

    shape: Shape
    created: list[Attempt]
    ran: list[Attempt]
    doctor: str
    n_layers_budget: int

    @property
    def failed(self) -> list[str]:
        """What went wrong, a line each."""
        lines = [f"doctor: {self.doctor}"] if self.doctor else []
        for what, attempts in (("create", self.created), ("run", self.ran)):
            lines += [f"{what}: {attempt}" for attempt in attempts if attempt.result != "ok"]
        return lines


def check_shape(shape: Shape, directory: Path) -> Check:
    """Write a shape and try everything on it. Files are removed again.

    Raises:
        RuntimeError: a program ended without saying what was wrong.
        subprocess.CalledProcessError: a file could not be written.
    """
    whole = write_model(directory / "whole.gguf", shape)
    created = _attempts(whole, "--create")
    report = diagnose(whole).model
    assert report is not None
    inspection = inspect_model(whole, parse_budget("0.4"), 4096)
    whole.unlink()
    part = write_model(directory / "part.gguf", shape, n_layers=min(shape.n_layers, shape.n_layers_run))
    ran = _attempts(part)
    part.unlink()
    return Check(shape, created, ran, report.refusal, len(inspection.kv.layers))


def refused(directory: Path) -> list[tuple[str, str]]:
    """Architectures that have no budget, and why, from the tiny models of upstream's test-llama-archs.

    Raises:
        RuntimeError: a refusal does not say which architecture it is about.
        subprocess.CalledProcessError: the models could not be written.
    """
    subprocess.run([PROGRAMS / "test-llama-archs", "-o", f"{directory}/"], check=True, capture_output=True)
    found = set()
    for path in directory.glob("*.gguf"):
        try:
            with load_without_weights(path) as model:
                plan_context(model, Options(n_ctx=256, budget="0.5"))
        except DepthKVError as error:
            line = re.search(r"architecture '(.+?)': (.+)$", str(error))
            if line is None:
                raise RuntimeError(f"{path.name} is refused without its architecture: {error}") from None
            found.add((line[1], line[2]))
    return sorted(found)


def _attempts(model: Path, *options: str) -> list[Attempt]:
    done = subprocess.run([_RUN, model, *options], capture_output=True, text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    if done.returncode not in (0, 1) or not rows or any(len(row) != 5 for row in rows):
        raise RuntimeError(f"depth-zoo-run {model.name} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return [Attempt(fa, k, v, shifted == "1", result) for fa, k, v, shifted, result in rows]
