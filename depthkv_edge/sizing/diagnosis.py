"""What this installation is, what the machine has, and what of a model fits it."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from depthkv_edge import __version__
from depthkv_edge.engine import capi, library
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.engine.context import load_without_weights
from depthkv_edge.engine.devices import ALL_LAYERS, Device, Offload, devices
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.facts import engine_facts, machine_facts, model_facts, trained_ctx
from depthkv_edge.sizing.fit import Need, contexts_up_to, free_memory, measuring

_api = llama_cpp.llama_cpp

BUDGETS = (1.0, 0.6, 0.4, 0.2)
_LEAST_CTX, _MOST_CTX = 2048, 2**17
_MOST_ROWS = 6


@dataclass(frozen=True)
class Case:
    """What a context and a budget need.

    Attributes:
        need: None if the engine refuses: the budget is below the least cells of a layer, say.
        fits: everything together stays under what is free, and so does what devices hold there.
    """

    n_ctx: int
    budget: float
    need: Need | None
    fits: bool


@dataclass(frozen=True)
class ModelReport:
    """A model on this machine.

    Attributes:
        facts: see `facts.model_facts`.
        trained_ctx: context that it was trained for.
        refusal: why no budget is defined for it; empty if one is.
        cases: by context, the smallest first, and budget, the full cache first.
    """

    path: Path
    facts: dict[str, Any]
    trained_ctx: int
    refusal: str
    cases: list[Case]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `doctor` says. Memory is in bytes."""

    version: str
    python: str
    engine: dict[str, Any]
    library: Path
    system_info: str
    devices: list[Device]
    machine: dict[str, Any]
    threads: int
    memory_free: int
    memory_usable: int
    model: ModelReport | None

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        data = asdict(self) | {"library": str(self.library)}
        if self.model is not None:
            data["model"]["path"] = str(self.model.path)
            for case, written in zip(self.model.cases, data["model"]["cases"], strict=True):
                written["need"] = None if case.need is None else case.need.to_dict()
        return data


def diagnose(model: Path | None = None, n_gpu_layers: int = ALL_LAYERS) -> Diagnosis:
    """Look at the installation, the machine, and a model if there is one. No weights are read.

    Args:
        n_gpu_layers: layers of the model on GPUs, if there are any.

    Raises:
        DepthKVError: the engine is not built, or the model's file is damaged.
    """
    usable = free_memory()
    return Diagnosis(
        version=__version__,
        python=f"{sys.implementation.name} {sys.version.split()[0]}",
        engine=engine_facts(),
        library=library.library_dir(),
        system_info=" ".join(_api.llama_print_system_info().decode("utf-8", "replace").split()),
        devices=devices(),
        machine=machine_facts(psutil.cpu_count(logical=False) or os.cpu_count() or 1),
        threads=os.cpu_count() or 1,
        memory_free=psutil.virtual_memory().available,
        memory_usable=usable,
        model=None if model is None else _report(model, usable, Offload(n_gpu_layers)),
    )


def _report(path: Path, usable: int, offload: Offload) -> ModelReport:
    facts = model_facts(path)
    trained = trained_ctx(path) or 0
    refusal = _refusal(path)
    most = min(trained, _MOST_CTX)
    contexts = [n for n in contexts_up_to(most) if n >= min(_LEAST_CTX, most)] if trained else []
    if len(contexts) > _MOST_ROWS:
        contexts = [contexts[0], *contexts[1 - _MOST_ROWS :]]
    cases = []
    with measuring(path, offload=offload) as need_of:
        for n_ctx in reversed(contexts):
            for budget in BUDGETS[: 1 if refusal else None]:
                try:
                    need = need_of(n_ctx, budget, 512)
                except DepthKVError:
                    need = None
                cases.append(Case(n_ctx, budget, need, need is not None and need.fits(usable)))
    return ModelReport(path, facts, trained, refusal, cases)


def _refusal(path: Path) -> str:
    with load_without_weights(path) as model:
        return capi.last_error() if capi.llama_depthkv_layer_count(model) < 0 else ""
