"""The GGUF that a calibration goes into must be the model that was calibrated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import dequantize, quantize
from support.tiny import write_mamba
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthkv_edge import DepthKVError
from depthkv_edge.calibrate import match
from depthkv_edge.calibrate.match import check_match
from depthkv_edge.modelfile.reader import open_gguf

State = dict[str, torch.Tensor]
Change = Callable[[str, np.ndarray], np.ndarray]

N_LAYERS = 3
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "mistral": MODEL_ARCH.LLAMA,
    "phi3": MODEL_ARCH.PHI3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}


def tiny(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose norms, unlike those of a new one, are not all ones."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": N_LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | heads | changes)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.0 if model_type.startswith("gemma") else 1.0, 0.2)
    return model


def unchanged(name: str, weights: np.ndarray) -> np.ndarray:
    return weights


def convert(path: Path, model_type: str, state: State, change: Change = unchanged, n_layers: int = N_LAYERS) -> Path:
    """The GGUF of a model, embeddings in Q8_0, with Gemma's norms as its converter writes them."""
    architecture = ARCHITECTURES[model_type]
    names = get_tensor_name_map(architecture, n_layers)
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(n_layers)
    for hf_name, parameter in state.items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None
        weights = parameter.detach().float().numpy()
        if name.endswith("norm.weight") and model_type.startswith("gemma"):
            weights = weights + 1
        weights = change(name, weights)
        if name == "token_embd.weight":
            q8 = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weights, q8), raw_dtype=q8)
        elif "norm" in name or weights.ndim == 1:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, weights.astype(np.float16))
    return finish(writer, path)


def finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path: Path, n_layers: int, state: State) -> str:
    with pytest.raises(DepthKVError) as caught:
        check_match(path, n_layers, state, model="some/model")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("model_type", "tied"), [*((name, False) for name in ARCHITECTURES), ("llama", True), ("gemma3_text", True)]
)
def test_families(tmp_path, model_type, tied):
    model = tiny(model_type, tie_word_embeddings=tied)
    state = dict(model.named_parameters()) if tied else model.state_dict()
    path = convert(tmp_path / "m.gguf", model_type, state)
    check_match(path, N_LAYERS, model.state_dict())
    bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    check_match(path, N_LAYERS, bf16)
    other = tiny(model_type, seed=1, tie_word_embeddings=tied)
    message = refused(path, N_LAYERS, other.state_dict())
    assert "token_embd.weight" in message and "m.gguf" in message and "some/model" in message


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_wrappers(tmp_path, prefix):
    """A multimodal wrapper has other names and other towers; a bare model has no prefix."""
    state = tiny("gemma3_text").state_dict()
    path = convert(tmp_path / "m.gguf", "gemma3_text", state)
    wrapped = {name.replace("model.", prefix, 1): tensor for name, tensor in state.items()}
    wrapped["model.vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"] = torch.zeros(7)
    check_match(path, N_LAYERS, wrapped)
    wrapped[prefix + "layers.2.input_layernorm.weight"] = torch.ones(64)
    assert "tensor blk.2.attn_norm.weight" in refused(path, N_LAYERS, wrapped)


def test_padded_vocabulary(tmp_path):
    state = tiny("llama").state_dict()
    padded = state | {"model.embed_tokens.weight": torch.cat([state["model.embed_tokens.weight"], torch.zeros(32, 64)])}
    check_match(convert(tmp_path / "a.gguf", "llama", state), N_LAYERS, padded)
    check_match(convert(tmp_path / "b.gguf", "llama", padded), N_LAYERS, state)


def test_other_sizes(tmp_path):
    path = convert(tmp_path / "m.gguf", "llama", tiny("llama").state_dict())
    message = refused(path, 5, tiny("llama", num_hidden_layers=5).state_dict())
    assert "has 3 layers and some/model has 5" in message and "m.gguf" in message
    assert "hidden size 64, not 128" in refused(path, N_LAYERS, tiny("llama", hidden_size=128).state_dict())


@pytest.mark.parametrize("name", ["blk.1.ffn_norm.weight", "output_norm.weight"])
def test_one_norm(tmp_path, name):
    """The first tensor that differs is named, though the embeddings are the same."""
    state = tiny("llama").state_dict()
    path = convert(tmp_path / "m.gguf", "llama", state, lambda n, w: w * 1.05 if n == name else w)
    assert f"tensor {name} " in refused(path, N_LAYERS, state)


def test_other_architectures(tmp_path):
    llama = tiny("llama").state_dict()
    assert "token_embd.weight" in refused(write_mamba(tmp_path / "mamba.gguf"), 1, llama)
    # a file with the very embeddings, but norms of another family
    gemma = tiny("gemma3_text", tie_word_embeddings=False).state_dict()
    gemma["model.embed_tokens.weight"] = llama["model.embed_tokens.weight"]
    assert "norm" in refused(convert(tmp_path / "g.gguf", "gemma3_text", gemma), N_LAYERS, llama)
    unknown = finish(GGUFWriter(tmp_path / "n.gguf", "nonesuch"), tmp_path / "n.gguf")
    assert "'nonesuch' is not known" in refused(unknown, N_LAYERS, llama)


def test_draft_layers(tmp_path):
    state = tiny("llama").state_dict()
    for count, add, part in (1, "add_uint32", "has 2 layers"), ("one", "add_string", "nextn_predict_layers is 'one'"):
        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_block_count(N_LAYERS)
        getattr(writer, add)("llama.nextn_predict_layers", count)
        assert part in refused(finish(writer, tmp_path / "m.gguf"), N_LAYERS, state)


def test_nothing_to_compare(tmp_path):
    state = tiny("llama").state_dict()
    path = convert(tmp_path / "m.gguf", "llama", state)
    assert "no counterpart" in refused(path, N_LAYERS, {})
    assert "no counterpart" in refused(path, N_LAYERS, {name: t.to("meta") for name, t in state.items()})
    embedding = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    assert "no counterpart" in refused(path, N_LAYERS, embedding)


@pytest.fixture(scope="module")
def smollm2_state(smollm2: Path) -> State:
    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    return model.state_dict()


def test_packaged_model(smollm2, smollm2_state, tmp_path):
    """As it is, and quantised otherwise."""
    check_match(smollm2, 30, smollm2_state)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(30)
    for tensor in open_gguf(smollm2).tensors:
        if tensor.name == "token_embd.weight":
            q4 = GGMLQuantizationType.Q4_0
            weights = quantize(dequantize(tensor.data, tensor.tensor_type), q4)
            writer.add_tensor(tensor.name, weights, raw_dtype=q4)
        elif "norm" in tensor.name:
            writer.add_tensor(tensor.name, tensor.data)
    check_match(finish(writer, tmp_path / "m.gguf"), 30, smollm2_state)


def test_same_shapes_random_weights(smollm2, smollm2_state):
    generator = torch.Generator().manual_seed(0)
    random = {name: torch.randn(t.shape, generator=generator) for name, t in smollm2_state.items() if t.numel() < 3e7}
    assert "token_embd.weight" in refused(smollm2, 30, random)
    random["model.embed_tokens.weight"] = smollm2_state["model.embed_tokens.weight"]
    assert "norm.weight" in refused(smollm2, 30, random)


def test_an_embedding_that_cannot_be_read_leaves_it_to_the_norms(tmp_path, monkeypatch):
    """gguf-py does not know every quantisation."""

    def read(data: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        if kind == GGMLQuantizationType.Q8_0:
            raise NotImplementedError
        return dequantize(data, kind)

    monkeypatch.setattr(match, "dequantize", read)
    state, other = tiny("llama").state_dict(), tiny("llama", seed=1).state_dict()
    path = convert(tmp_path / "m.gguf", "llama", state)
    check_match(path, N_LAYERS, state)
    assert "norm.weight" in refused(path, N_LAYERS, other)
    embedding = {"model.embed_tokens.weight": state["model.embed_tokens.weight"]}
    path = convert(tmp_path / "e.gguf", "llama", embedding)
    assert "cannot read type Q8_0, and there are no norms" in refused(path, N_LAYERS, embedding)
