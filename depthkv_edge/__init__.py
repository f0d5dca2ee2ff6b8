"""llama.cpp with a KV cache that is small from the start: every layer holds its own number of KV cells."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from depthkv_edge.errors import DepthKVError

if TYPE_CHECKING:
    from depthkv_edge.engine.library import cmake_dir, include_dir, library_dir
    from depthkv_edge.engine.stats import KVStats, LayerStats
    from depthkv_edge.llama import Llama

__all__ = ["DepthKVError", "KVStats", "LayerStats", "Llama", "__version__", "cmake_dir", "include_dir", "library_dir"]

try:
    __version__ = metadata.version("depthkv-edge")
except metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_LAZY = {
    "Llama": "depthkv_edge.llama",
    "KVStats": "depthkv_edge.engine.stats",
    "LayerStats": "depthkv_edge.engine.stats",
    "cmake_dir": "depthkv_edge.engine.library",
    "include_dir": "depthkv_edge.engine.library",
    "library_dir": "depthkv_edge.engine.library",
}


def __getattr__(name: str) -> Any:
    # lazy, so that `depthkv-edge --help` and a wrong argument answer before a shared library is loaded
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
