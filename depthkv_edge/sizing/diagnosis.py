"""What this installation is, what the machine has, and what of a model fits it."""

from __future__ import annotations

import ctypes
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
from depthkv_edge.errors import DepthKVError
from depthkv_edge.measure.facts import engine_facts, machine_facts, model_facts, trained_ctx
from depthkv_edge.sizing.fit import Need, contexts_up_to, free_memory, measuring

_api = llama_cpp.llama_cpp

BUDGETS = (1.0, 0.6, 0.4, 0.2)
_LEAST_CTX, _MOST_CTX = 2048, 2**17
_MOST_ROWS = 6
_DEVICE_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta")  # enum ggml_backend_dev_type


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on. Memory is in bytes; 0 where the backend does not say."""

    backend: str
    name: str
    description: str
    type: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Case:
    """What a context and a budget need.

    Attributes:
        need: None if the engine refuses: the budget is below the least cells of a layer, say.
        fits: everything together stays under what is free.
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


def diagnose(model: Path | None = None) -> Diagnosis:
    """Look at the installation, the machine, and a model if there is one. No weights are read.

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
        model=None if model is None else _report(model, usable),
    )


def devices() -> list[Device]:
    """Devices in ggml's registry, in its order. See ggml/include/ggml-backend.h."""
    _api.llama_backend_init()
    count = _ggml("ggml_backend_dev_count", [], ctypes.c_size_t)
    get = _ggml("ggml_backend_dev_get", [ctypes.c_size_t], ctypes.c_void_p)
    return [_device(get(i)) for i in range(count())]


def _device(device: int) -> Device:
    def text(name: str, of: int) -> str:
        return (_ggml(name, [ctypes.c_void_p], ctypes.c_char_p)(of) or b"").decode("utf-8", "replace")

    size_p = ctypes.POINTER(ctypes.c_size_t)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _ggml("ggml_backend_dev_memory", [ctypes.c_void_p, size_p, size_p], None)(
        device, ctypes.byref(free), ctypes.byref(total)
    )
    kind = _ggml("ggml_backend_dev_type", [ctypes.c_void_p], ctypes.c_int)(device)
    backend = _ggml("ggml_backend_dev_backend_reg", [ctypes.c_void_p], ctypes.c_void_p)(device)
    return Device(
        backend=text("ggml_backend_reg_name", backend),
        name=text("ggml_backend_dev_name", device),
        description=text("ggml_backend_dev_description", device).strip(),
        type=_DEVICE_TYPES[kind] if 0 <= kind < len(_DEVICE_TYPES) else str(kind),
        memory_total=total.value,
        memory_free=free.value,
    )


def _ggml(name: str, argtypes: list[Any], restype: Any) -> Any:
    # the bindings bind no device functions. A handle finds what its library depends on, except on Windows
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    names = [f"{prefix}{part}{suffix}" for part in ("ggml", "ggml-base") for prefix in ("lib", "")]
    paths = [path for path in (library.library_dir() / file for file in names) if path.is_file()]
    for handle in (_api._lib, *(ctypes.CDLL(str(path)) for path in paths)):
        try:
            function = getattr(handle, name)
        except AttributeError:
            continue
        function.argtypes, function.restype = argtypes, restype
        return function
    raise DepthKVError(f"the engine has no {name}: it is not this package's build; run scripts/setup.sh")


def _report(path: Path, usable: int) -> ModelReport:
    facts = model_facts(path)
    trained = trained_ctx(path) or 0
    refusal = _refusal(path)
    most = min(trained, _MOST_CTX)
    contexts = [n for n in contexts_up_to(most) if n >= min(_LEAST_CTX, most)] if trained else []
    if len(contexts) > _MOST_ROWS:
        contexts = [contexts[0], *contexts[1 - _MOST_ROWS :]]
    cases = []
    with measuring(path) as need_of:
        for n_ctx in reversed(contexts):
            for budget in BUDGETS[: 1 if refusal else None]:
                try:
                    need = need_of(n_ctx, budget, 512)
                except DepthKVError:
                    need = None
                cases.append(Case(n_ctx, budget, need, need is not None and need.total <= usable))
    return ModelReport(path, facts, trained, refusal, cases)


def _refusal(path: Path) -> str:
    with load_without_weights(path) as model:
        return capi.last_error() if capi.llama_depthkv_layer_count(model) < 0 else ""
