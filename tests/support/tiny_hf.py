"""Random transformers models of a few kilobytes, one for each family that calibration handles."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedModel, PreTrainedTokenizerFast

N_VOCAB, N_LAYERS = 160, 4

_COMMON = dict(
    vocab_size=N_VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_SLIDING = dict(
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=48,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
)

# family: (configuration class, arguments, layers whose cache grows)
FAMILIES = {
    "llama": ("LlamaConfig", {}, (0, 1, 2, 3)),
    "qwen2": ("Qwen2Config", {}, (0, 1, 2, 3)),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, (0, 1, 2, 3)),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 8}, (0, 1, 2, 3)),
    "phi3": ("Phi3Config", {"sliding_window": None}, (0, 1, 2, 3)),
    "gemma2": ("Gemma2Config", _SLIDING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}, (1, 3)),
    "gemma3": ("Gemma3TextConfig", _SLIDING, (1, 3)),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 48,
            "layer_types": _SLIDING["layer_types"],
        },
        (1, 3),
    ),
}

# family: (configuration class, arguments, what the refusal says)
REFUSED = {
    "deepseek": (
        "DeepseekV3Config",
        {
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 4,
        },
        "MLA",
    ),
    "mistral sliding": ("MistralConfig", {"sliding_window": 48, "head_dim": 8}, "sliding window"),
    "bloom": ("BloomConfig", {"n_layer": N_LAYERS, "n_head": 4}, "attention"),
    "mamba": ("MambaConfig", {"state_size": 8}, "Mamba"),
    "qwen3 next": (
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 0,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "LinearAttention",
    ),
    "bert": ("BertConfig", {"num_key_value_heads": 4}, "causal"),
}


def make_model(family: str, seed: int = 0, scale: float = 6.0) -> PreTrainedModel:
    """A random model.

    Args:
        scale: factor of the weights of the attention scores: random ones are flat, and eviction would hardly matter.
    """
    config_class, arguments, _ = (FAMILIES | REFUSED)[family]
    config = getattr(transformers, config_class)(**(_COMMON | arguments))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and parameter.shape[0] != N_VOCAB:
                parameter.mul_(scale)
            if name.endswith("sinks"):
                parameter.normal_()
    return model.eval()


def make_tokens(n: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return torch.randint(3, N_VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def save_pair(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """A tiny llama as a Hugging Face directory, with a tokenizer of one token for each character, and as a GGUF."""
    model = make_model("llama", seed)
    repo, gguf = directory / "hf", directory / "model.gguf"
    model.save_pretrained(repo)
    characters = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(repo)

    writer = GGUFWriter(gguf, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(N_VOCAB)
    # the same tokens, for text of these characters
    tokens = [*("▁" if c == " " else c for c in characters), *(f"<{i}>" for i in range(len(characters), N_VOCAB))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.NORMAL] * (N_VOCAB - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, N_LAYERS)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return repo, gguf
