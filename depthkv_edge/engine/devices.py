"""What ggml can compute on, and which layers of a model are put where."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from depthkv_edge.engine import library
from depthkv_edge.engine.capi import llama_cpp
from depthkv_edge.errors import DepthKVError

_api = llama_cpp.llama_cpp

ALL_LAYERS = -1  # of `llama_model_params::n_gpu_layers`
_TYPES = ("CPU", "GPU", "integrated GPU", "accelerator", "meta")  # enum ggml_backend_dev_type
_GPUS = _TYPES[1:3]


@dataclass(frozen=True)
class Offload:
    """Which layers of a model are on GPUs, as in `llama_model_params`. On a machine without one it says nothing.

    Attributes:
        n_gpu_layers: so many, from the last one on; ALL_LAYERS.
        split_mode, main_gpu: None for llama.cpp's default.
        tensor_split: parts of each GPU; empty for llama.cpp's choice.
    """

    n_gpu_layers: int = 0
    split_mode: int | None = None
    main_gpu: int | None = None
    tensor_split: tuple[float, ...] = ()

    def apply(self, params: Any) -> Any:
        """Fill in `llama_model_params`; returns what has to live as long as they do."""
        params.n_gpu_layers = self.n_gpu_layers
        if self.split_mode is not None:
            params.split_mode = self.split_mode
        if self.main_gpu is not None:
            params.main_gpu = self.main_gpu
        if not self.tensor_split:
            return None
        parts = (ctypes.c_float * _api.llama_max_devices())(*self.tensor_split)
        params.tensor_split = parts
        return parts


ON_CPU, EVERYWHERE = Offload(), Offload(ALL_LAYERS)


@dataclass(frozen=True)
class Device:
    """A device that ggml can compute on. Memory is in bytes; 0 where the backend does not say."""

    backend: str
    name: str
    description: str
    type: str
    memory_total: int
    memory_free: int

    @property
    def is_gpu(self) -> bool:
        return self.type in _GPUS


def devices() -> list[Device]:
    """Devices in ggml's registry, in its order. See ggml/include/ggml-backend.h.

    Raises:
        DepthKVError: the library is another build's.
    """
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
        type=_TYPES[kind] if 0 <= kind < len(_TYPES) else str(kind),
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
