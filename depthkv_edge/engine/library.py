"""Which libllama the process uses: find ours, and import the bindings on top of it."""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import depthkv_edge
from depthkv_edge.errors import DepthKVError

BINDINGS = "llama-cpp-python"
BINDINGS_VERSION = "0.3.36"  # mirrors the C structs of the pinned llama.cpp field by field: no other version will do
INSTALL_BINDINGS = f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install {BINDINGS}=={BINDINGS_VERSION}"

_NAMES = {"win32": ("llama.dll", "libllama.dll"), "darwin": ("libllama.dylib", "libllama.so")}


def holds_libllama(directory: Path) -> bool:
    """Whether a directory has a libllama that could be loaded here."""
    return any((directory / name).is_file() for name in _NAMES.get(sys.platform, ("libllama.so",)))


def _candidates() -> list[Path]:
    # An editable install keeps the sources in the checkout and the built libraries in site-packages: the package's
    # path may list both, or, when the checkout itself is on sys.path, only the sources. Then the record knows.
    directories = [Path(base) / "lib" for base in depthkv_edge.__path__]
    try:
        record = metadata.files("depthkv-edge") or []
    except metadata.PackageNotFoundError:
        record = []
    for entry in record:
        if entry.name in _NAMES.get(sys.platform, ("libllama.so",)):
            directories.append(Path(str(entry.locate())).parent)
    return directories


def library_dir() -> Path:
    """Directory of the libllama built with this package; `DEPTHKV_LIB_PATH` overrides it.

    Raises:
        DepthKVError: no libllama there.
    """
    override = os.environ.get("DEPTHKV_LIB_PATH")
    directories = [Path(override)] if override else _candidates()
    for directory in directories:
        if holds_libllama(directory):
            return directory.resolve()
    if override:
        raise DepthKVError(f"DEPTHKV_LIB_PATH={override} holds no libllama: name the directory that does, or unset it")
    raise DepthKVError(
        f"no libllama in {directories[0]}: the engine is not built; run scripts/setup.sh in the source tree"
    )


def include_dir() -> Path:
    """Directory of llama-depthkv.h, llama.h and the ggml headers that belong to the library.

    Raises:
        DepthKVError: no libllama.
    """
    return library_dir().parent / "include"


def cmake_dir() -> Path:
    """Directory for CMake's `depthkv_DIR`: `find_package(depthkv)` then offers the target `depthkv::llama`.

    Raises:
        DepthKVError: no libllama.
    """
    return library_dir() / "cmake" / "depthkv"


def _installed_version() -> str | None:
    try:
        return metadata.version(BINDINGS)
    except metadata.PackageNotFoundError:
        return None


def import_bindings() -> ModuleType:
    """Import `llama_cpp` on top of our libllama.

    Raises:
        DepthKVError: the bindings are missing, have another version, or already run on another library.
    """
    directory = library_dir()
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is None:
        # before the import, since another version may fail on a missing symbol with a message that helps nobody
        version = _installed_version()
        if version is None:
            raise DepthKVError(f"{BINDINGS} is not installed: run `{INSTALL_BINDINGS}`")
        _require_version(version)
        os.environ["LLAMA_CPP_LIB_PATH"] = str(directory)
        loaded = importlib.import_module("llama_cpp.llama_cpp")
    bindings = importlib.import_module("llama_cpp")
    _require_version(bindings.__version__)
    current = Path(loaded._lib._name).resolve().parent
    if current != directory:
        raise DepthKVError(
            f"llama_cpp was imported before depthkv_edge and runs on the libllama in {current}, not on {directory}: "
            "import depthkv_edge first"
        )
    return bindings


def _require_version(version: str) -> None:
    if version != BINDINGS_VERSION:
        raise DepthKVError(
            f"{BINDINGS} {version} is installed, and the engine needs {BINDINGS_VERSION}: run `{INSTALL_BINDINGS}`"
        )
