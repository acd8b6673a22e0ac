"""Models in GGUF files, seen as Hugging Face checkpoints: config, tensor names and layouts, tokenizer.

Formats: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, whose
renaming and q/k permutation are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import dequantize

from .errors import UserError
from .families import FAMILIES, Decoder, Family
from .gguf_header import TensorInfo, read_header

# llama.cpp calls Mistral's architecture "llama" as well: without a sliding window they are one.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# What scaled rotary embeddings divide their frequencies by.
ROPE_FACTORS = "rope_freqs.weight"

CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
TOKEN_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
    "unknown_token_id": "unk_token_id",
}


def metadata(path: Path, key: str, default: Any = None) -> Any:
    """The value of one metadata key."""
    return read_header(path).metadata.get(key, default)


def gguf_config(path: Path) -> dict[str, Any]:
    """What config.json of the same model would say. Raises UserError for an unsupported architecture."""
    architecture = metadata(path, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: GGUF architecture {architecture!r} is not supported; supported are: "
            + ", ".join(ARCHITECTURES)
        )
    tensors = set(read_header(path).tensors)
    _refuse_scaled_rope(path, architecture, tensors)
    config = {name: metadata(path, f"{architecture}.{key}") for key, name in CONFIG_KEYS.items()}
    missing = [key for key, name in CONFIG_KEYS.items() if config[name] is None]
    if missing:
        raise UserError(f"{path} lacks the metadata {architecture}.{missing[0]}; it is no usable GGUF model")
    family = _family(architecture)
    for name in ("rms_norm_eps", "rope_theta"):
        config[name] = _shortest_decimal(config[name])
    config |= {name: metadata(path, f"tokenizer.ggml.{key}") for key, name in TOKEN_IDS.items()}
    return config | {
        "model_type": ARCHITECTURES[architecture],
        "architectures": [family.architectures[0]],
        "vocab_size": _vocabulary(path),
        "head_dim": metadata(path, f"{architecture}.attention.key_length")
        or config["hidden_size"] // config["num_attention_heads"],
        "hidden_act": "silu",
        "attention_bias": architecture == "llama" and "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }


def _family(architecture: str) -> Family:
    return next(family for family in FAMILIES if family.name == ARCHITECTURES[architecture])


def _refuse_scaled_rope(path: Path, architecture: str, tensors: set[str]) -> None:
    kind = metadata(path, f"{architecture}.rope.scaling.type", "none")
    if kind != "none" or ROPE_FACTORS in tensors:
        raise UserError(
            f"{path}: scaled rotary embeddings cannot be read from GGUF; use the safetensors checkpoint"
        )


def _vocabulary(path: Path) -> int:
    embedding = read_header(path).tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no token embedding; it is no whole model")
    return embedding.shape[0]


def _shortest_decimal(value: float) -> float:
    """The decimal that was meant by a number stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor under its Hugging Face name. `heads` > 0: rows of each head are to be un-permuted."""

    name: str
    path: Path
    info: TensorInfo
    heads: int

    def read(self) -> torch.Tensor:
        """The dequantized tensor, float32, in Hugging Face layout. Reads these bytes of the file only."""
        raw = np.fromfile(self.path, dtype=np.uint8, count=self.info.bytes, offset=self.info.offset)
        rows = raw.reshape(*self.info.shape[:-1], -1)
        try:
            values = dequantize(rows, self.info.quantization)
        except NotImplementedError:
            kind = self.info.quantization.name
            raise UserError(f"{self.path}: tensor {self.info.name} is {kind}, which cannot be read") from None
        tensor = torch.from_numpy(values.astype(np.float32, copy=False)).reshape(self.info.shape)
        return unpermute(tensor, self.heads) if self.heads else tensor


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of rotary rows: pairs (2i, 2i+1) of a head go back to (i, i + dim/2)."""
    rows = weight.shape[0] // heads
    pairs = weight.reshape(heads, rows // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def gguf_tensors(path: Path, decoder: Decoder) -> Iterator[GGUFTensor]:
    """The file's tensors under their Hugging Face names. Raises UserError for one that has no such name."""
    permuted = metadata(path, "general.architecture") == "llama"
    for info in read_header(path).tensors.values():
        if info.name == ROPE_FACTORS:
            continue
        kind = info.name.split(".")[-2]
        heads = {"attn_q": decoder.heads, "attn_k": decoder.kv_heads}.get(kind, 0)
        name = _hf_name(info.name, decoder.family, path)
        yield GGUFTensor(name, path, info, heads if permuted else 0)


def _hf_name(name: str, family: Family, path: Path) -> str:
    stem, _, suffix = name.rpartition(".")
    outside = {"token_embd": family.embedding, "output_norm": family.final_norm, "output": family.head}
    if stem in outside:
        return f"{outside[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    module = block_modules(family).get(match[2]) if match else None
    if match is None or module is None:
        raise UserError(f"{path}: tensor {name} has no place in a {family.name} model")
    return f"{family.block(int(match[1]))}.{module}.{suffix}"


def block_modules(family: Family) -> dict[str, str]:
    """The modules of a block in the order of the forward pass, by the names that GGUF has for them."""
    query, key, value, output = family.attention
    gate, up, down = family.mlp
    modules = {
        "attn_norm": family.attention_norm,
        "attn_q": query,
        "attn_k": key,
        "attn_v": value,
        "attn_output": output,
        "ffn_norm": family.mlp_norm,
        "ffn_gate": gate,
        "ffn_up": up,
        "ffn_down": down,
    }
    if family.query_key_norms:
        modules |= dict(zip(("attn_q_norm", "attn_k_norm"), family.query_key_norms, strict=True))
    return modules
