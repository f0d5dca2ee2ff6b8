"""Writes a shape as a GGUF file with random weights."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from gguf import GGUFWriter

from benchmarks.zoo.shapes import Shape

PROGRAMS = Path(__file__).parents[2] / "build" / "engine" / "bin"

_N_EMBD, _N_FF, _N_VOCAB = 64, 64, 256
_N_SWA_RUN = 64  # with weights, so that windows slide in the few hundred tokens that are run


def write_model(path: Path, shape: Shape, *, n_layers: int = 0) -> Path:
    """A model of random weights that runs in a blink.

    Args:
        n_layers: so many layers with weights, and sliding windows that are short. 0: all layers, no weights: a sparse
            file, enough for what reads none.

    Raises:
        subprocess.CalledProcessError: llama.cpp does not take the shape.
    """
    metadata = path.with_suffix(".metadata")
    if n_layers:
        shape = replace(shape, n_swa=min(shape.n_swa, _N_SWA_RUN))
    _write_metadata(metadata, shape, n_layers or shape.n_layers)
    make = [PROGRAMS / "depth-zoo-make", metadata, path, *([] if n_layers else ["--no-weights"])]
    subprocess.run(make, check=True, capture_output=True, text=True)
    metadata.unlink()
    return path


def _write_metadata(path: Path, shape: Shape, n_layers: int) -> None:
    writer = GGUFWriter(path, shape.arch)
    writer.add_name(shape.name)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd if shape.wide else _N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_heads_kv if isinstance(shape.n_heads_kv, int) else list(shape.n_heads_kv))
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.n_rot or shape.head)
    writer.add_vocab_size(_N_VOCAB)
    writer.add_tokenizer_model("none")
    if shape.n_swa:
        writer.add_sliding_window(shape.n_swa)
    if shape.swa_period:
        writer.add_sliding_window_pattern([(i + 1) % shape.swa_period != 0 for i in range(n_layers)])
    if shape.head_swa:
        writer.add_key_length_swa(shape.head_swa)
        writer.add_value_length_swa(shape.head_swa)
        writer.add_rope_dimension_count_swa(shape.head_swa)
        writer.add_rope_freq_base_swa(10_000.0)
    for key, value in shape.keys.items():
        if key == "attention.shared_kv_layers":  # the same share of the layers, after a whole number of periods
            own = (shape.n_layers - int(value)) * n_layers // shape.n_layers
            value = n_layers - own // shape.swa_period * shape.swa_period
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{shape.arch}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
