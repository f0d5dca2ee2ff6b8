"""Model files by path or by name, and what can be said of a file before it is loaded."""

from __future__ import annotations

from pathlib import Path

from depthkv_edge.assets import MODELS, fetch
from depthkv_edge.errors import DepthKVError


def resolve_model(name: str) -> Path:
    """Path of a GGUF from a path, or from the name of one in `depthkv_edge.assets`, which is fetched the first time.

    Raises:
        DepthKVError: the file cannot be had, or is not a GGUF.
    """
    if not name:
        raise DepthKVError(f"no model is named: give the path of a .gguf file, or {', '.join(MODELS)}")
    path = fetch(MODELS[name]) if name in MODELS else Path(name)
    check_gguf(path)
    return path


def check_gguf(path: Path) -> None:
    """Check that a file exists and starts as a GGUF does; the rest is the loader's to judge.

    Raises:
        DepthKVError: missing, unreadable or not a GGUF.
    """
    if path.is_dir():
        raise DepthKVError(f"model {path} is a directory: give the path of a .gguf file")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        names = ", ".join(MODELS)
        raise DepthKVError(f"model {path} does not exist: give the path of a .gguf file, or {names}") from None
    except OSError as error:
        raise DepthKVError(f"model {path} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise DepthKVError(f"model {path} is not a GGUF file (it starts with {magic!r}): convert it to GGUF first")
