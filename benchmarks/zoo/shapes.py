"""The attention geometry of the models that people run on their own devices, from the config.json of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """What a model's KV cache and attention depend on.

    Attributes:
        name: of the model.
        arch: `general.architecture` of its GGUF file.
        n_embd: width; matters only where `wide`.
        n_heads_kv: of every layer, or one for each that is run.
        head: size of a head; of the global layers where those differ.
        n_ctx: context that it was trained for.
        n_rot: dimensions of a head that are rotated; 0: all.
        wide: the architecture ties its width to heads times head size. Others are written with a width of 64.
        n_swa: sliding window in tokens; 0: none.
        swa_period: every so many layers one is global; 0: the architecture knows.
        head_swa: size of a head in layers with a sliding window, where it differs.
        n_layers_run: so few layers still have each kind.
        keys: further keys, without the architecture's prefix.
    """

    name: str
    arch: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_heads_kv: int | tuple[int, ...]
    head: int
    n_ctx: int
    rope_base: float = 10_000.0
    n_rot: int = 0
    wide: bool = False
    n_swa: int = 0
    swa_period: int = 0
    head_swa: int = 0
    n_layers_run: int = 4
    keys: Mapping[str, int | float | str] = field(default_factory=dict)


def _moe(n_experts: int, n_used: int) -> dict[str, int | float | str]:
    return {"expert_count": n_experts, "expert_used_count": n_used, "expert_feed_forward_length": 32}


_GEMMA3N = {"altup.num_inputs": 4, "altup.active_idx": 0, "embedding_length_per_layer_input": 32}
_GRANITE = {"logit_scale": 8.0, "residual_scale": 0.22, "embedding_scale": 12.0}
_MISTRAL3 = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.original_context_length": 16_384,
    "attention.temperature_scale": 0.1,
}
_PHI = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19}

SHAPES = (
    Shape("Llama 3.2 1B", "llama", 16, 2048, 32, 8, 64, 131_072, 500_000),
    Shape("Llama 3.2 3B", "llama", 28, 3072, 24, 8, 128, 131_072, 500_000),
    Shape("Llama 3.1 8B", "llama", 32, 4096, 32, 8, 128, 131_072, 500_000),
    Shape("Qwen2.5 0.5B", "qwen2", 24, 896, 14, 2, 64, 32_768, 1_000_000, wide=True),
    Shape("Qwen2.5 1.5B", "qwen2", 28, 1536, 12, 2, 128, 32_768, 1_000_000, wide=True),
    Shape("Qwen2.5 3B", "qwen2", 36, 2048, 16, 2, 128, 32_768, 1_000_000, wide=True),
    Shape("Qwen2.5 7B", "qwen2", 28, 3584, 28, 4, 128, 32_768, 1_000_000, wide=True),
    Shape("Qwen3 0.6B", "qwen3", 28, 1024, 16, 8, 128, 40_960, 1_000_000),
    Shape("Qwen3 1.7B", "qwen3", 28, 2048, 16, 8, 128, 40_960, 1_000_000),
    Shape("Qwen3 4B", "qwen3", 36, 2560, 32, 8, 128, 40_960, 1_000_000),
    Shape("Qwen3 8B", "qwen3", 36, 4096, 32, 8, 128, 40_960, 1_000_000),
    Shape("Qwen3 30B-A3B", "qwen3moe", 48, 2048, 32, 4, 128, 40_960, 1_000_000, keys=_moe(128, 8)),
    Shape(
        "Gemma 2 2B",
        "gemma2",
        26,
        2304,
        8,
        4,
        256,
        8192,
        n_swa=4096,
        keys={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    Shape("Gemma 3 1B", "gemma3", 26, 1152, 4, 1, 256, 32_768, 1_000_000, n_swa=512, n_layers_run=6),
    Shape("Gemma 3 4B", "gemma3", 34, 2560, 8, 4, 256, 131_072, 1_000_000, n_swa=1024, n_layers_run=6),
    # the first 20 layers have a cache, later ones read it
    Shape("Gemma 3n E2B", "gemma3n", 30, 2048, 8, 2, 256, 32_768, 1_000_000, n_swa=512, n_layers_run=25, keys=_GEMMA3N),
    Shape(
        "Gemma 4 E2B",
        "gemma4",
        35,
        1536,
        8,
        1,
        512,
        131_072,
        1_000_000,
        n_swa=512,
        swa_period=5,
        head_swa=256,
        n_layers_run=15,
        keys={"attention.shared_kv_layers": 20, "embedding_length_per_layer_input": 32},
    ),
    Shape(
        "Gemma 4 E4B",
        "gemma4",
        42,
        2560,
        8,
        2,
        512,
        131_072,
        1_000_000,
        n_swa=512,
        swa_period=6,
        head_swa=256,
        n_layers_run=12,
        keys={"attention.shared_kv_layers": 18, "embedding_length_per_layer_input": 32},
    ),
    Shape("Phi-3.5 mini", "phi3", 32, 3072, 32, 32, 96, 131_072, wide=True, keys=_PHI),
    Shape("Phi-4 mini", "phi3", 32, 3072, 24, 8, 128, 131_072, n_rot=96, wide=True, keys=_PHI),
    Shape("SmolLM2 135M", "llama", 30, 576, 9, 3, 64, 8192, 100_000),
    Shape("SmolLM2 360M", "llama", 32, 960, 15, 5, 64, 8192, 100_000),
    Shape("SmolLM2 1.7B", "llama", 24, 2048, 32, 32, 64, 8192, 130_000),
    Shape("SmolLM3 3B", "smollm3", 36, 2048, 16, 4, 128, 65_536, 5_000_000),
    Shape("Ministral 3 3B", "mistral3", 26, 3072, 32, 8, 128, 262_144, 1_000_000, keys=_MISTRAL3),
    Shape("Ministral 3 8B", "mistral3", 34, 4096, 32, 8, 128, 262_144, 1_000_000, keys=_MISTRAL3),
    Shape("Ministral 8B 2410", "llama", 36, 4096, 32, 8, 128, 32_768, 100_000_000),
    Shape("Mistral 7B v0.3", "llama", 32, 4096, 32, 8, 128, 32_768, 1_000_000),
    Shape(
        "Granite 3.3 2B",
        "granite",
        40,
        2048,
        32,
        8,
        64,
        131_072,
        10_000_000,
        keys=_GRANITE | {"attention.scale": 0.015625},
    ),
    Shape(
        "Granite 3.3 8B",
        "granite",
        40,
        4096,
        32,
        8,
        128,
        131_072,
        10_000_000,
        keys=_GRANITE | {"attention.scale": 0.0078125},
    ),
    Shape("OLMo 2 1B", "olmo2", 16, 2048, 16, 16, 128, 4096, 500_000, wide=True),
    Shape("OLMo 2 7B", "olmo2", 32, 4096, 32, 32, 128, 4096, 500_000, wide=True),
    Shape("gpt-oss 20B", "gpt-oss", 24, 2880, 64, 8, 64, 131_072, 150_000, n_swa=128, keys=_moe(32, 4)),
    Shape("EXAONE 4.0 1.2B", "exaone4", 30, 2048, 32, 8, 64, 65_536, 1_000_000, wide=True),
    # not models: the extremes of what grows with KV heads and layers
    Shape("128 KV heads", "llama", 8, 4096, 128, 128, 32, 8192),
    Shape("1 KV head of 8", "llama", 128, 2048, 8, 1, 64, 8192),
    Shape("13 KV heads", "llama", 12, 2048, 26, 13, 64, 8192),
)
"""Models first, then shapes that no model has yet."""
