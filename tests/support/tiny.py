"""Models of a few kilobytes, random and without a tokenizer: enough to load, and to be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

N_EMBD, N_FF, N_VOCAB = 64, 64, 32

Extra = Callable[[GGUFWriter], None]


def write_llama(
    path: Path, extra: Extra = lambda writer: None, n_layers: int = 2, *, n_ctx: int = 512, n_ff_q4_0: int = 0
) -> Path:
    """A llama of `n_layers` layers with 2 heads of 32, and whatever keys `extra` adds.

    Args:
        n_ctx: context that it was trained for.
        n_ff_q4_0: width of the feed-forward layers, which are Q4_0 then.
    """
    n_ff = n_ff_q4_0 or N_FF
    writer = _writer(path, "llama", n_layers, n_ctx, n_ff)
    writer.add_head_count(2)
    writer.add_rope_dimension_count(N_EMBD // 2)
    extra(writer)
    shapes = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (N_EMBD, N_EMBD), "attn_v": (N_EMBD, N_EMBD)}
    shapes |= {"attn_output": (N_EMBD, N_EMBD), "attn_norm": (N_EMBD,), "ffn_norm": (N_EMBD,)}
    wide = {"ffn_gate": (n_ff, N_EMBD), "ffn_up": (n_ff, N_EMBD), "ffn_down": (N_EMBD, n_ff)}
    for layer in range(n_layers):
        for name, shape in (shapes | wide).items():
            _tensor(writer, f"blk.{layer}.{name}.weight", shape, q4_0=bool(n_ff_q4_0) and name in wide)
    return _finish(writer, path)


def write_mamba(path: Path) -> Path:
    """A mamba of one layer: recurrent state, no KV cache."""
    d_inner, d_state, d_conv, dt_rank = 2 * N_EMBD, 8, 4, 4
    writer = _writer(path, "mamba", 1)
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(dt_rank)
    shapes = {"attn_norm.weight": (N_EMBD,), "ssm_in.weight": (2 * d_inner, N_EMBD)}
    shapes |= {"ssm_conv1d.weight": (d_inner, d_conv), "ssm_conv1d.bias": (d_inner,)}
    shapes |= {"ssm_x.weight": (dt_rank + 2 * d_state, d_inner), "ssm_dt.weight": (d_inner, dt_rank)}
    shapes |= {"ssm_dt.bias": (d_inner,), "ssm_a": (d_inner, d_state), "ssm_d": (d_inner,)}
    shapes |= {"ssm_out.weight": (N_EMBD, d_inner)}
    for name, shape in shapes.items():
        _tensor(writer, f"blk.0.{name}", shape)
    return _finish(writer, path)


def _writer(path: Path, architecture: str, n_layers: int, n_ctx: int = 512, n_ff: int = N_FF) -> GGUFWriter:
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(n_ff)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    _tensor(writer, "token_embd.weight", (N_VOCAB, N_EMBD))
    _tensor(writer, "output_norm.weight", (N_EMBD,))
    return writer


def _tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], *, q4_0: bool = False) -> None:
    data = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    if q4_0:
        kind = GGMLQuantizationType.Q4_0
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, data)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
