"""Is this GGUF the model that was calibrated? Compare what quantisation leaves alone, and what it only blurs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, TensorNameMap, get_tensor_name_map
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from depthkv_edge.errors import DepthKVError
from depthkv_edge.modelfile.reader import block_count, open_gguf, scalar

if TYPE_CHECKING:
    import torch

EMBEDDING = "token_embd.weight"

_MIN_COSINE = 0.9  # of a row and the same row quantised; 2 bits per weight give .95, rows of different models about 0
_N_ROWS = 64
_NORM_ERROR = 2**-7  # relative: a norm rounded to bfloat16 on its way is off by up to 2**-8
_FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


def check_match(
    gguf: Path, n_layers: int, state: Mapping[str, torch.Tensor], *, model: str = "the Hugging Face model"
) -> None:
    """Check that a GGUF and a Hugging Face model are the same model, up to quantisation.

    Compared are the number of layers, the weights of the norms (a converter keeps them in F32; Gemma's adds one) and
    rows of the token embedding. Q and K weights are not: some converters permute them.

    Args:
        gguf: path of the GGUF.
        n_layers: layers of the Hugging Face model.
        state: its parameters by name, as `state_dict()` gives them; tensors on the meta device are not compared.
        model: what to call it in an error.

    Raises:
        DepthKVError: they differ, or nothing could be compared; the message names the first tensor that differs.
    """
    reader = open_gguf(gguf)
    try:
        architecture = scalar(reader, "general.architecture")
        names = _name_map(architecture, n_layers)
        n_blocks = block_count(reader) - _n_draft_layers(reader, f"{architecture}.nextn_predict_layers")
    except DepthKVError as error:
        raise DepthKVError(f"model {gguf}: {error}") from None
    advice = "give the GGUF that was made from it"
    if n_blocks != n_layers:
        raise DepthKVError(f"{gguf} has {n_blocks} layers and {model} has {n_layers}: {advice}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    mapped = _by_gguf_name(state, names)
    if EMBEDDING not in tensors or EMBEDDING not in mapped:
        raise DepthKVError(f"tensor {EMBEDDING} of {gguf} ({architecture}) has no counterpart in {model}: {advice}")
    for name, difference in _differences(tensors, mapped):
        if difference:
            raise DepthKVError(f"tensor {name} of {gguf} is not that of {model} ({difference}): {advice}")


def _n_draft_layers(reader: GGUFReader, key: str) -> int:
    count = scalar(reader, key)
    if count is not None and not isinstance(count, int):
        raise DepthKVError(f"key {key} is {count!r}, not a number of layers: get the model file again")
    return count or 0


def _name_map(architecture: object, n_layers: int) -> TensorNameMap:
    for arch, name in MODEL_ARCH_NAMES.items():
        if name == architecture:
            return get_tensor_name_map(arch, n_layers)
    raise DepthKVError(f"architecture {architecture!r} is not known to gguf-py: update the gguf package")


def _by_gguf_name(state: Mapping[str, torch.Tensor], names: TensorNameMap) -> dict[str, torch.Tensor]:
    mapped: dict[str, torch.Tensor] = {}
    for hf_name, tensor in state.items():
        # a multimodal wrapper keeps its language model under a name of its own, and a bare model has no prefix at all
        plain = hf_name.replace("language_model.", "")
        for candidate in (plain, f"model.{plain}"):
            if name := names.get_name(candidate, try_suffixes=(".weight", ".bias")):
                mapped.setdefault(name, tensor)
                break
    return {name: tensor for name, tensor in mapped.items() if not tensor.is_meta}


def _differences(tensors: Mapping[str, ReaderTensor], mapped: Mapping[str, torch.Tensor]) -> Iterable[tuple[str, str]]:
    """Tensors compared, in the order of the file, and what is different; the embedding first, for it says most."""
    norms = [name for name, tensor in tensors.items() if _is_norm(name, tensor)]
    yield EMBEDDING, _embedding_difference(tensors[EMBEDDING], mapped[EMBEDDING], has_norms=bool(norms))
    if norms and not any(name in mapped for name in norms):
        yield norms[0], "it has no counterpart"
    for name in norms:
        if name in mapped:
            yield name, _norm_difference(tensors[name], mapped[name])
    for name in mapped:
        if name.endswith("norm.weight") and "attn_q" not in name and "attn_k" not in name and name not in tensors:
            yield name, "the file lacks it"


def _is_norm(name: str, tensor: ReaderTensor) -> bool:
    # norms of Q and K are permuted along with them
    per_head = "attn_q" in name or "attn_k" in name
    return name.endswith("norm.weight") and not per_head and tensor.tensor_type in _FLOATS and len(tensor.shape) == 1


def _norm_difference(tensor: ReaderTensor, parameter: torch.Tensor) -> str:
    if tuple(parameter.shape) != (tensor.n_elements,):
        return f"{tensor.n_elements} values, not {list(parameter.shape)}"
    stored = dequantize(tensor.data, tensor.tensor_type).reshape(-1).astype(np.float64)
    weight = _numpy(parameter).astype(np.float64)
    scale = np.maximum(np.abs(weight), 1e-3)
    errors = [np.abs(stored - wanted) / np.maximum(np.abs(wanted), scale) for wanted in (weight, weight + 1)]
    error = min(float(error.max()) for error in errors)
    return "" if error <= _NORM_ERROR else f"relative difference {error:.2g}"


def _embedding_difference(tensor: ReaderTensor, parameter: torch.Tensor, has_norms: bool) -> str:
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)} dimensions, not 2"
    n_embd, n_vocab = (int(n) for n in tensor.shape)
    if parameter.ndim != 2 or parameter.shape[1] != n_embd:
        return f"hidden size {n_embd}, not {parameter.shape[-1]}"
    # either side may pad its vocabulary; rows of unused tokens may be zero
    rows = np.unique(np.linspace(0, min(n_vocab, parameter.shape[0]) - 1, _N_ROWS).astype(int))
    try:
        stored = dequantize(np.asarray(tensor.data)[rows], tensor.tensor_type).astype(np.float64)
    except NotImplementedError:  # by gguf-py, for a quantisation it cannot read yet: then the norms alone decide
        return "" if has_norms else f"gguf-py cannot read type {tensor.tensor_type.name}, and there are no norms"
    weights = _numpy(parameter[rows.tolist()]).astype(np.float64)
    lengths = np.linalg.norm(stored, axis=1) * np.linalg.norm(weights, axis=1)
    cosines = (stored * weights).sum(axis=1)[lengths > 0] / lengths[lengths > 0]
    if not cosines.size:
        return "nothing but zeros"
    cosine = float(np.median(cosines))
    return "" if cosine >= _MIN_COSINE else f"cosine similarity {cosine:.2f}"


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
