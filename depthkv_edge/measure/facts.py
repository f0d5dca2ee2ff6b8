"""What a measurement depends on beside the settings: the machine, the engine, the model."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from gguf import LlamaFileType

from depthkv_edge.engine import library
from depthkv_edge.modelfile.keys import read_calibration
from depthkv_edge.modelfile.reader import open_gguf, scalar

LLAMA_CPP_COMMIT = "0c1e57098"  # of the release in `library.BINDINGS_VERSION`; native/llama.cpp.lock


def machine_facts(n_threads: int) -> dict[str, Any]:
    """System, processor, physical cores, threads used, bytes of memory."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        "threads": n_threads,
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    if sys.platform == "linux":
        # x86 has "model name", some ARM boards have only "Model" or "Hardware", others none
        facts = dict(_split(line) for line in Path("/proc/cpuinfo").read_text().splitlines())
        for name in ("model name", "Model", "Hardware"):
            if facts.get(name):
                return facts[name]
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def engine_facts() -> dict[str, Any]:
    """Versions of llama.cpp, of its bindings and of our API, and the hash of the library.

    Raises:
        DepthKVError: the engine is not built.
    """
    from depthkv_edge.engine import capi

    file = library.library_dir() / Path(capi.llama_cpp.llama_cpp._lib._name).name
    return {
        "llama_cpp_python": library.BINDINGS_VERSION,
        "llama_cpp_commit": LLAMA_CPP_COMMIT,
        "library_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "llama_depthkv_version": capi.VERSION,
    }


def model_facts(path: Path) -> dict[str, Any]:
    """Name, file, size, architecture, type of the weights, and how the model was calibrated; unknown facts are None.

    Raises:
        DepthKVError: the file is damaged, or its calibration is.
    """
    reader = open_gguf(path)
    calibration = read_calibration(path)
    return {
        "name": scalar(reader, "general.name") or path.stem,
        "file": path.name,
        "bytes": path.stat().st_size,
        "architecture": scalar(reader, "general.architecture"),
        "weights": _weights(scalar(reader, "general.file_type")),
        "calibration": None
        if calibration is None
        else {
            "method": calibration.method,
            "corpus": calibration.corpus,
            "recall_windows": calibration.recall_windows,
            "stability": _known(calibration.stability),
            "gain": _known(calibration.gain),
        },
    }


def trained_ctx(path: Path) -> int | None:
    """Context that the model was trained for; None if the file does not say."""
    reader = open_gguf(path)
    return scalar(reader, f"{scalar(reader, 'general.architecture')}.context_length")


def _weights(file_type: int | None) -> str | None:
    try:
        return LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # missing, or newer than the list
        return None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
