"""The sizes of real models, so that they can be measured without their weights."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..errors import UserError, first_line
from ..families import family_of

_SIZES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
_ROWS: dict[str, tuple[Any, ...]] = {
    "llama-7b": ("llama", 32, 4096, 11008, 32, 32, 32000, 2048, False),
    "llama-13b": ("llama", 40, 5120, 13824, 40, 40, 32000, 2048, False),
    "llama2-7b": ("llama", 32, 4096, 11008, 32, 32, 32000, 4096, False),
    "llama2-13b": ("llama", 40, 5120, 13824, 40, 40, 32000, 4096, False),
    "llama3-8b": ("llama", 32, 4096, 14336, 32, 8, 128256, 8192, False),
    "llama3.2-1b": ("llama", 16, 2048, 8192, 32, 8, 128256, 131072, True),
    "llama3.2-3b": ("llama", 28, 3072, 8192, 24, 8, 128256, 131072, True),
    "mistral-7b": ("mistral", 32, 4096, 14336, 32, 8, 32000, 32768, False),
    "qwen2.5-0.5b": ("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, True),
    "qwen2.5-1.5b": ("qwen2", 28, 1536, 8960, 12, 2, 151936, 131072, True),
    "qwen2.5-7b": ("qwen2", 28, 3584, 18944, 28, 4, 152064, 131072, False),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 151936, 40960, True),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, False),
    "tinyllama-1.1b": ("llama", 22, 2048, 5632, 32, 4, 32000, 2048, False),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 49152, 8192, True),
    "smollm2-360m": ("llama", 32, 960, 2560, 15, 5, 49152, 8192, True),
    "smollm2-1.7b": ("llama", 24, 2048, 8192, 32, 32, 49152, 8192, True),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SHAPES = tuple(_ROWS)


def shape_config(shape: str, blocks: int | None = None) -> Any:
    """The transformers config of a built-in shape, or of a folder with a config.json.

    `blocks` leaves that many of its decoder blocks. Raises UserError for an unknown shape.
    """
    config = _built_in(shape) if shape in _ROWS else _of_folder(shape)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
    return config


def shape_name(shape: str) -> str:
    """What a shape is called: of a folder its own name, wherever we stand."""
    return Path(shape).resolve().name


def _built_in(shape: str) -> Any:
    values = dict(zip(_SIZES, _ROWS[shape], strict=True))
    kind = values.pop("model_type")
    return AutoConfig.for_model(kind, architectures=[_ARCHITECTURES[kind]], **values)


def _of_folder(shape: str) -> Any:
    if not (Path(shape) / "config.json").is_file():
        near = get_close_matches(shape, SHAPES, n=3, cutoff=0.4) or SHAPES
        raise UserError(
            f"unknown shape {shape!r}; nearest are: {', '.join(near)} (or give a folder with config.json)"
        )
    try:
        config = AutoConfig.from_pretrained(shape)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{Path(shape) / 'config.json'}: {first_line(error)}") from None
    family_of(config)
    return config
