"""The model as both environments read it: a full-precision Hugging Face directory, and logits to check it by."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from depthkv_edge.calibrate.load import find_source, load_model, quiet
from depthkv_edge.calibrate.target import Target, inspect_model
from depthkv_edge.errors import DepthKVError

_N_POSITIONS = 32  # whose logits are compared


def export_model(gguf: Path, directory: Path) -> None:
    """Write a GGUF, dequantised, as a Hugging Face directory. Does nothing if there is one.

    Raises:
        DepthKVError: transformers does not load it, or not as F32.
    """
    if directory.exists():
        return
    model = load_model(find_source(str(gguf)), "cpu", "float32")
    packed = [name for name, weight in model.named_parameters() if weight.dtype != torch.float32]
    if packed:
        raise DepthKVError(f"{gguf}: weight {packed[0]} is not dequantised: uninstall the package kernels, or give F32")
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)  # or the dense weights count as packed ones, and are not saved
    part = directory.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        model.save_pretrained(part)
    os.replace(part, directory)


def load_exported(directory: Path) -> Target:
    """The exported model.

    Raises:
        DepthKVError: its layers cannot be pruned, or not all of them grow with the context.
    """
    target = inspect_model(load_model(find_source(str(directory)), "cpu", "float32"))
    n_bounded = len(target.layers) - len(target.layer_ids)
    if n_bounded:
        raise DepthKVError(
            f"{n_bounded} layers of this model have a sliding window, which kvpress would prune as if they had none: "
            "compare a model without"
        )
    return target


def write_reference(target: Target, tokens: Sequence[int], path: Path) -> None:
    """Logits of the full cache after some of the tokens, spread over them. Does nothing if the file exists.

    The file has positions int64 [n], and logits float32 [n, n_vocab].
    """
    if path.exists():
        return
    positions = np.unique(np.linspace(0, len(tokens) - 1, _N_POSITIONS).round().astype(np.int64))
    ids = torch.tensor([list(tokens)], device=target.device)
    with torch.no_grad():
        hidden = target.hidden(ids, target.new_cache())
        logits = target.logits(hidden[torch.from_numpy(positions)])
    part = path.with_suffix(".part.npz")
    np.savez(part, positions=positions, logits=logits.cpu().numpy())
    os.replace(part, path)
