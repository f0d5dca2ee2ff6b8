"""Copies what says which operations Metal, CUDA and Vulkan support out of the pinned llama.cpp.

native/tests/test-depth-ops.cpp asks it.

usage: supports_op.py TREE OUT

Writes OUT/metal.inc, OUT/cuda.inc and OUT/vulkan.inc. A function that another version lacks ends it with one line.
"""

from __future__ import annotations

import sys
from pathlib import Path

# by backend, in the order in which they need each other: a file below ggml/src, and how the definition begins
FUNCTIONS = {
    "metal": (
        ("ggml-metal/ggml-metal-common.cpp", "static bool ggml_metal_fwht_supported_size("),
        ("ggml-metal/ggml-metal-common.cpp", "bool ggml_metal_op_mul_mat_use_fwht("),
        ("ggml-metal/ggml-metal-common.cpp", "bool ggml_metal_op_mul_mat_use_mm("),
        ("ggml-metal/ggml-metal-common.cpp", "bool ggml_metal_op_mul_mat_id_use_mm("),
        ("ggml-metal/ggml-metal-device.m", "static bool ggml_metal_supports_mul_mat_op("),
        ("ggml-metal/ggml-metal-device.m", "bool ggml_metal_device_supports_op("),
    ),
    "cuda": (
        ("ggml-cuda/fwht.cu", "bool ggml_cuda_op_mul_mat_use_fwht("),
        ("ggml-cuda/fattn.cu", "enum best_fattn_kernel {"),
        ("ggml-cuda/fattn.cu", "static bool ggml_cuda_fattn_kv_type_supported("),
        ("ggml-cuda/fattn.cu", "static best_fattn_kernel ggml_cuda_get_best_fattn_kernel("),
        ("ggml-cuda/fattn.cu", "bool ggml_cuda_flash_attn_ext_supported("),
        ("ggml-cuda/ggml-cuda.cu", "static bool ggml_backend_cuda_device_supports_op("),
    ),
    "vulkan": (
        ("ggml-vulkan/ggml-vulkan.cpp", "bool ggml_vk_concat_supported("),
        ("ggml-vulkan/ggml-vulkan.cpp", "bool ggml_vk_dim01_contiguous("),
        ("ggml-vulkan/ggml-vulkan.cpp", "static bool ggml_backend_vk_device_supports_op("),
    ),
}


def definition(path: Path, begins: str) -> str:
    """The lines from the one that begins so to the bracket in the first column that ends it."""
    lines = path.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(begins) and not line.endswith(";")]
    if len(starts) != 1:
        sys.exit(f"supports_op.py: {path} has {len(starts)} definitions that begin with '{begins}', not one")
    end = next(i for i in range(starts[0], len(lines)) if lines[i] in ("}", "};"))
    return "\n".join(lines[starts[0] : end + 1])


def main(tree: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for backend, functions in FUNCTIONS.items():
        parts = [definition(tree / "ggml" / "src" / file, begins) for file, begins in functions]
        (out / f"{backend}.inc").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
