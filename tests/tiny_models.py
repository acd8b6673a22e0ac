"""Configs of tiny models of every family, and how to save one with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 512

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

UNGROUPED = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
}
HALVES = {"rope_type": "linear", "factor": 2.0}
OPT_SIZES = {
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "init_std": 0.15,
    **{
        name: size for name, size in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")
    },
}

# By model, with what is peculiar to it, and then by what none of them has.
TINY_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),  # and TinyLlama
    "llama2": lambda: LlamaConfig(**SIZES | UNGROUPED),
    "llama3.2": lambda: LlamaConfig(
        **SIZES | TIED, rope_theta=500_000.0, rope_scaling=LLAMA3_ROPE, head_dim=16
    ),
    "smollm2": lambda: LlamaConfig(
        **SIZES | TIED | {"hidden_size": 96, "num_attention_heads": 6}, rope_theta=100_000.0
    ),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=48, sliding_window=None),
    "mistral-windowed": lambda: MistralConfig(**SIZES, sliding_window=20),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2.5-tied": lambda: Qwen2Config(**SIZES | TIED, rope_theta=1e6),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "gemma": lambda: GemmaConfig(**SIZES | TIED | {"num_key_value_heads": 1}, head_dim=32),
    "gemma2": lambda: Gemma2Config(
        **SIZES | TIED,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES | TIED,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=20,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_scaling=HALVES,
    ),
    "phi3": lambda: Phi3Config(**SIZES | UNGROUPED, sliding_window=200),
    "phi4-mini": lambda: Phi3Config(
        **SIZES | TIED | {"num_attention_heads": 2, "num_key_value_heads": 1},
        partial_rotary_factor=0.5,
        original_max_position_embeddings=128,
        rope_scaling=LONG_ROPE,
    ),
    "opt": lambda: OPTConfig(**OPT_SIZES | TIED),
    "llama-tied": lambda: LlamaConfig(**SIZES | TIED | {"num_key_value_heads": 1}),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "heads-of-24": lambda: LlamaConfig(**SIZES, head_dim=24, rope_scaling=HALVES),
}


def save_tiny_model(folder: Path, config: Any, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with nonzero biases and uneven norms, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def checkpoints(
    configs: Mapping[str, Callable[[], Any]], folder: Path, tokenizer: Any
) -> Callable[[str], Path]:
    """`checkpoints(...)(kind)`: the folder below `folder` of a tiny model of that config, made once."""

    @cache
    def make(kind: str) -> Path:
        return save_tiny_model(folder / kind, configs[kind](), tokenizer)

    return make


def torch_model(folder: Path) -> Any:
    """The model as transformers runs it, with the one attention of it that leaves nothing out (caps)."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
