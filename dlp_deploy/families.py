"""The one place that knows how each model family names and shapes its layers.

A `Family` is a description, not code: pruning, export and the recipes read layer names from it, and
the graph builder reads from `Decoder` what the arithmetic of a block is. Adding a family is adding
an entry to `FAMILIES`, and to `decoder_of` only if its config says things in a new way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError


@dataclass(frozen=True)
class Family:
    """Names of the modules of a Hugging Face causal language model, and what is peculiar in its arithmetic.

    `attention` and `mlp` are the prunable linear layers of one decoder block, in the order of the forward
    pass; embeddings are never pruned (DLP, section 3), and the head only when that is asked for. The last of
    each writes to the residual stream and the others read the normed stream: query, key and value, or one
    layer with their rows in this order; gate and up (up alone without `gated`), or one layer with their rows.
    """

    name: str
    architectures: tuple[str, ...]
    attention: tuple[str, ...] = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    gated: bool = True
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    # Norms of what attention and MLP add to the residual stream.
    branch_norms: tuple[str, str] | None = None
    query_key_norms: tuple[str, str] | None = None
    norm: Literal["rms", "layer"] = "rms"
    # What is added to the stored weight of a norm.
    norm_offset: float = 0.0
    # Embeddings are multiplied by the root of their width.
    scaled_embedding: bool = False
    # A learned embedding of positions, and the row of the first one; rotary embedding without it.
    positions: str | None = None
    first_position: int = 0
    intermediate_key: str = "intermediate_size"
    activation_key: str = "hidden_act"
    # Settings of config.json that other values than these are not described for.
    requires: tuple[tuple[str, Any], ...] = ()
    # Class of the module that holds the blocks, where it is not Model behind the prefix of all classes.
    base_class: str | None = None
    embedding_class: str = "Embedding"
    # What onnxruntime-genai calls the family, where it has another name for it.
    genai_type: str | None = None
    # Linear layers of the blocks are stored [in, out], as GPT-2's Conv1D does.
    transposed: bool = False
    # A block returns its hidden states as the first of a tuple.
    returns_tuple: bool = False

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
    Family("gemma", ("GemmaForCausalLM",), norm_offset=1.0, scaled_embedding=True),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        mlp_norm="pre_feedforward_layernorm",
        branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
        scaled_embedding=True,
        activation_key="hidden_activation",
    ),
    Family(
        "gemma3_text",
        ("Gemma3ForCausalLM",),
        mlp_norm="pre_feedforward_layernorm",
        branch_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        query_key_norms=("self_attn.q_norm", "self_attn.k_norm"),
        norm_offset=1.0,
        scaled_embedding=True,
        activation_key="hidden_activation",
        requires=(("use_bidirectional_attention", False),),
        base_class="Gemma3TextModel",
        embedding_class="Gemma3TextScaledWordEmbedding",
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        attention=("self_attn.qkv_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    Family(
        "opt",
        ("OPTForCausalLM",),
        attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        mlp=("fc1", "fc2"),
        gated=False,
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        norm="layer",
        positions="model.decoder.embed_positions",
        first_position=2,
        intermediate_key="ffn_dim",
        activation_key="activation_function",
        requires=(
            ("do_layer_norm_before", True),
            ("layer_norm_elementwise_affine", True),
            ("_remove_final_layer_norm", False),
        ),
        base_class="OPTDecoder",
        genai_type="decoder",
    ),
)


# What config.json must say for every family.
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")


def family_of(config: Any) -> Family:
    """The family of a transformers config. Raises UserError for one that is not described here.

    `outline.outline_of` knows names and sizes of others, which is enough to prune them.
    """
    names = architectures_of(config)
    for family in FAMILIES:
        if set(names) & set(family.architectures):
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UserError(
        f"architecture {', '.join(names) or 'unknown'} is not supported here; supported are: {supported}"
    )


def architectures_of(config: Any) -> tuple[str, ...]:
    return tuple(getattr(config, "architectures", None) or ())


def is_described(config: Any) -> bool:
    """Whether the family of a transformers config is described here."""
    return any(set(architectures_of(config)) & set(family.architectures) for family in FAMILIES)


@dataclass(frozen=True)
class Outline:
    """Names and sizes of one model: what is needed to run and prune it block by block."""

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

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def linear_groups(self) -> list[tuple[str, ...]]:
        """Names of all linear layers in order, the head last; those that share an input are together."""
        blocks = [
            tuple(f"{self.family.block(index)}.{layer}" for layer in group)
            for index in range(self.blocks)
            for group in self._groups()
        ]
        return [*blocks, (self.family.head,)]

    def _groups(self) -> Sequence[tuple[str, ...]]:
        # Which layers share an input is not known of families that are not described.
        return [(layer,) for layer in self.family.linears]


@dataclass(frozen=True)
class Decoder(Outline):
    """A model of a described family, with the arithmetic that its config states.

    `windows` has one entry per block: how many of the latest positions it attends to, or None for all.
    `rotary_dim` is how many channels of a head are rotated, 0 without rotary embedding; blocks with a
    window rotate by `local_theta` where it is given. A cap c limits x to c * tanh(x / c).
    """

    activation: str
    windows: tuple[int | None, ...]
    rotary_dim: int
    query_scale: float
    local_theta: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None

    def _groups(self) -> Sequence[tuple[str, ...]]:
        attention, mlp = self.family.attention, self.family.mlp
        return (attention[:-1], attention[-1:], mlp[:-1], mlp[-1:])

    @property
    def mlp_is_linear_in_up(self) -> bool:
        """Whether the MLP's last layer reads s times as much when the up layer gives s > 0 times as much."""
        return self.family.gated or self.activation == "relu"

    @property
    def embedding_scale(self) -> float:
        return self.hidden**0.5 if self.family.scaled_embedding else 1.0


def decoder_of(config: Any) -> Decoder:
    """Read a `Decoder` from a transformers config.

    Raises UserError when the architecture is unknown, the head counts do not divide, or a setting asks
    for arithmetic that is not described here.
    """
    family = family_of(config)
    _require_sizes(config, family)
    _require_described(config, family)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(kv_heads, int) or heads % kv_heads:
        raise UserError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Decoder(
        family=family,
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, family.intermediate_key),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        max_positions=_positions(config),
        # The default of torch's LayerNorm, whose models do not state it.
        norm_epsilon=getattr(config, "rms_norm_eps", 1e-5),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        activation=getattr(config, family.activation_key),
        windows=_windows(config),
        rotary_dim=0 if family.positions else int(head_dim * _rotary_share(config)),
        query_scale=(getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        local_theta=getattr(config, "rope_local_base_freq", None),
        attention_cap=getattr(config, "attn_logit_softcapping", None),
        logit_cap=getattr(config, "final_logit_softcapping", None),
    )


def rope_settings(config: Any) -> dict[str, Any]:
    """The settings of the rotary embedding, with "rope_type" always among them."""
    rope = dict(getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {})
    return {"rope_type": rope.get("type", "default")} | rope


def _rotary_share(config: Any) -> float:
    return rope_settings(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))


def _positions(config: Any) -> int:
    """LongRoPE changes all its angles in a text longer than the one it was pretrained on; we end there."""
    rope = rope_settings(config)
    if rope["rope_type"] != "longrope":
        return config.max_position_embeddings
    original = getattr(config, "original_max_position_embeddings", None)
    stated = rope.get("original_max_position_embeddings", original)
    return min(config.max_position_embeddings, stated or config.max_position_embeddings)


def _windows(config: Any) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    reached = window is not None and window < _positions(config)
    if not reached or not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _require_sizes(config: Any, family: Family) -> None:
    for key in (*SIZES, family.intermediate_key):
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"config.json: {key} is {value!r}, but must be a positive number")


def _require_described(config: Any, family: Family) -> None:
    for key, value in family.requires:
        found = getattr(config, key, value)
        if found != value:
            raise UserError(f"config.json: {key} {found} is not supported; {family.name} models need {value}")
    width = getattr(config, "word_embed_proj_dim", None) or config.hidden_size
    if width != config.hidden_size:
        raise UserError(
            f"config.json: embeddings of {width} channels projected to {config.hidden_size} are not supported"
        )
