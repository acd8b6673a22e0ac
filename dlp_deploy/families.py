"""The one place that knows how each model family names and shapes its layers.

A `Family` is a description, not code: pruning, export and the recipes read layer names from it, and
the graph builder reads from `Decoder` what the arithmetic of a block is. Adding a family is adding
an entry to `FAMILIES`, and to `decoder_of` only if its config says things in a new way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of the modules of a Hugging Face causal language model.

    `linears` are the prunable linear layers of one decoder block, in the order of the forward pass;
    embeddings and the head are never pruned (DLP, section 3).
    """

    name: str
    architectures: tuple[str, ...]
    attention: tuple[str, str, str, str] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query_key_norms: tuple[str, str] | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        return self.attention + self.mlp

    def block(self, index: int) -> str:
        """Prefix of the tensors of decoder block `index`, e.g. "model.layers.3"."""
        return f"{self.blocks}.{index}"


FAMILIES = (
    Family("llama", ("LlamaForCausalLM",)),
    Family("mistral", ("MistralForCausalLM",)),
    Family("qwen2", ("Qwen2ForCausalLM",)),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        query_key_norms=("self_attn.q_norm", "self_attn.k_norm"),
    ),
)


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises UserError for one that is not described here."""
    names = tuple(getattr(config, "architectures", None) or ())
    for family in FAMILIES:
        if set(names) & set(family.architectures):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UserError(
        f"architecture {', '.join(names) or 'unknown'} is not supported; supported are: {supported}"
    )


@dataclass(frozen=True)
class Decoder:
    """Sizes and arithmetic of one model, as its config states them."""

    family: Family
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    tied_embeddings: bool
    activation: str
    sliding_window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


def decoder_of(config: Any) -> Decoder:
    """Read a `Decoder` from a transformers config.

    Raises UserError when the architecture is unknown or the head counts do not divide.
    """
    family = family_of(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise UserError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    windowed = getattr(config, "use_sliding_window", True)
    return Decoder(
        family=family,
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        activation=config.hidden_act,
        sliding_window=getattr(config, "sliding_window", None) if windowed else None,
    )
