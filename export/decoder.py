"""The walk from token ids to logits, the same for every engine.

What differs between engines is a `Target`: how it writes a norm and an attention, and which inputs
it expects. What differs between precisions is a `Linears`: how it writes a matrix product. So a new
engine or precision is one object, and a new model family is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from onnx import TensorProto

from ..checkpoint import Checkpoint
from ..errors import UserError
from ..families import Decoder
from .graph import GraphWriter


class Weights:
    """Float32 arrays of a checkpoint, one at a time, by the names of transformers."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        self._decoder = decoder

    def array(self, name: str) -> np.ndarray:
        return self._checkpoint.tensor(name).to(torch.float32).numpy()

    def linear(self, layer: str) -> np.ndarray:
        """Weight [out, in] of a linear layer; of the embedding where the head is tied to it."""
        name = f"{layer}.weight"
        if layer == self._decoder.family.head and name not in self._names:
            name = f"{self._decoder.family.embedding}.weight"
        return self.array(name)

    def bias(self, layer: str) -> np.ndarray | None:
        name = f"{layer}.bias"
        return self.array(name) if name in self._names else None


class Linears(Protocol):
    """Writes linear layers that share the input `x`; returns their outputs in the order of `layers`."""

    def __call__(
        self, graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]
    ) -> tuple[str, ...]: ...


class Target(Protocol):
    """How one engine wants the parts of a decoder written."""

    def begin(self, graph: GraphWriter) -> str:
        """Declare inputs and shared tensors; return the edge of the token ids."""
        ...

    def norm(
        self, graph: GraphWriter, stream: str, branch: str | None, weight: str, name: str
    ) -> tuple[str, str]:
        """Add `branch` to the residual stream; return (normalized stream, stream)."""
        ...

    def attention(
        self,
        graph: GraphWriter,
        block: int,
        query: str,
        key: str,
        value: str,
        head_norms: tuple[str, str] | None,
    ) -> str:
        """Rotate, attend over the cache of `block`, and return [batch, tokens, heads * head_dim]."""
        ...


def write_decoder(
    graph: GraphWriter,
    weights: Weights,
    decoder: Decoder,
    target: Target,
    linears: Linears,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Write the whole model and declare the output `logits`; `advance` is called after each block."""
    family = decoder.family
    # The first output: that is where DeepSparse's pipelines look for it.
    graph.output("logits", TensorProto.FLOAT, ("batch", "tokens", decoder.vocabulary))
    ids = target.begin(graph)
    embedding = graph.weight("embedding", weights.array(f"{family.embedding}.weight"))
    stream = graph.node("Gather", embedding, ids, name="embed")
    branch: str | None = None
    for index in range(decoder.blocks):
        stream, branch = _write_block(graph, weights, decoder, target, linears, index, stream, branch)
        advance()
    scale = graph.weight("final_norm.weight", weights.array(f"{family.final_norm}.weight"))
    normed, _ = target.norm(graph, stream, branch, scale, "final_norm")
    (logits,) = linears(graph, weights, normed, (family.head,))
    graph.node("Identity", logits, name="logits")


def _write_block(
    graph: GraphWriter,
    weights: Weights,
    decoder: Decoder,
    target: Target,
    linears: Linears,
    index: int,
    stream: str,
    branch: str | None,
) -> tuple[str, str]:
    family, block = decoder.family, decoder.family.block(index)

    def vector(part: str) -> str:
        name = f"{block}.{part}.weight"
        return graph.weight(name, weights.array(name))

    normed, stream = target.norm(
        graph, stream, branch, vector(family.attention_norm), f"{block}.{family.attention_norm}"
    )
    query_layer, key_layer, value_layer, output_layer = (f"{block}.{layer}" for layer in family.attention)
    query, key, value = linears(graph, weights, normed, (query_layer, key_layer, value_layer))
    head_norms = None
    if family.query_key_norms:
        head_norms = (vector(family.query_key_norms[0]), vector(family.query_key_norms[1]))
    attended = target.attention(graph, index, query, key, value, head_norms)
    (branch,) = linears(graph, weights, attended, (output_layer,))

    normed, stream = target.norm(graph, stream, branch, vector(family.mlp_norm), f"{block}.{family.mlp_norm}")
    gate_layer, up_layer, down_layer = (f"{block}.{layer}" for layer in family.mlp)
    gate, up = linears(graph, weights, normed, (gate_layer, up_layer))
    gated = graph.node("Mul", _activate(graph, gate, decoder.activation), up, name=f"{block}.mlp.product")
    (branch,) = linears(graph, weights, gated, (down_layer,))
    return stream, branch


def _activate(graph: GraphWriter, x: str, activation: str) -> str:
    if activation not in ("silu", "swish"):
        raise UserError(f"config.json: activation {activation} is not supported by the exporter; silu is")
    return graph.node("Mul", x, graph.node("Sigmoid", x, name=f"{x}.sigmoid"), name=f"{x}.silu")


def rms_norm(graph: GraphWriter, x: str, weight: str, epsilon: float, name: str) -> str:
    """RMSNorm over the last axis in primitive operators: x / sqrt(mean(x^2) + epsilon) * weight."""
    square = graph.node("Pow", x, graph.scalar(2.0), name=f"{name}.square")
    mean = graph.node("ReduceMean", square, name=f"{name}.mean", axes=[-1], keepdims=1)
    root = graph.node(
        "Sqrt", graph.node("Add", mean, graph.scalar(epsilon), name=f"{name}.shift"), name=f"{name}.rms"
    )
    return graph.node("Mul", graph.node("Div", x, root, name=f"{name}.unit"), weight, name=name)


def add_bias(graph: GraphWriter, weights: Weights, x: str, layer: str) -> str:
    bias = weights.bias(layer)
    if bias is None:
        return x
    return graph.node("Add", x, graph.weight(f"{layer}.bias", bias), name=f"{layer}.biased")


def rotary_tables(config: Any, decoder: Decoder, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the rotary angles, float32 [positions, head_dim / 2] (RoPE, arXiv 2104.09864).

    Scaled variants (Llama 3, linear, YaRN) come from transformers' own table of them. Raises UserError
    for variants whose angles depend on the length of the text.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("dynamic", "longrope"):
        raise UserError(
            f"config.json: rotary embedding of type {kind} depends on the text's length; not exportable"
        )
    if kind == "default":
        theta = rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))
        exponents = torch.arange(0, decoder.head_dim, 2, dtype=torch.int64).float() / decoder.head_dim
        frequencies, scale = 1.0 / (theta**exponents), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float())
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()
