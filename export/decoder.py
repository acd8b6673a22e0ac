"""The walk from token ids to logits, the same for every engine.

What differs between engines is a `Target`: how it writes a norm and an attention, and which inputs
it expects. What differs between precisions is a `Linears`: how it writes a matrix product. So a new
engine or precision is one object, and a new model family is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from onnx import TensorProto

from ..checkpoint import Checkpoint
from ..families import Decoder, Outline
from .activation import activate, soft_cap
from .graph import GraphWriter
from .grid import Grid
from .quantize import Quantized, quantize


class Weights:
    """Float32 arrays of a checkpoint, one at a time, by the names of transformers."""

    def __init__(self, checkpoint: Checkpoint, decoder: Outline) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        self._decoder = decoder

    def array(self, name: str) -> np.ndarray:
        return self._checkpoint.tensor(name).to(torch.float32).numpy()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, None where there is none of this name."""
        return self._checkpoint.shape(name) if name in self._names else None

    def linear(self, layer: str) -> np.ndarray:
        """Weight [out, in] of a linear layer; of the embedding where the head is tied to it."""
        return self._oriented(layer, self.array(self.weight_name(layer)))

    def weight_name(self, layer: str) -> str:
        """The tensor that is the weight of a linear layer: of a tied head, the embedding."""
        name = f"{layer}.weight"
        tied = layer == self._decoder.family.head and name not in self._names
        return f"{self._decoder.family.embedding}.weight" if tied else name

    def _oriented(self, layer: str, stored: np.ndarray) -> np.ndarray:
        family = self._decoder.family
        return stored.T if family.transposed and layer.startswith(f"{family.blocks}.") else stored

    def zeros(self, layer: str) -> np.ndarray:
        """Which weights of a linear layer are zero, bool [out, in]."""
        return self._oriented(layer, (self._checkpoint.tensor(self.weight_name(layer)) == 0).numpy())

    def quantized(self, layer: str, grid: Grid) -> Quantized:
        """The weight of a linear layer on a grid, each value rounded to the nearest level."""
        return quantize(self.linear(layer), grid)

    def bias(self, layer: str) -> np.ndarray | None:
        name = f"{layer}.bias"
        return self.array(name) if name in self._names else None

    def norm(self, norm: str) -> np.ndarray:
        """What a norm multiplies by, float32 [channels]."""
        return self.array(f"{norm}.weight") + np.float32(self._decoder.family.norm_offset)

    def norm_bias(self, norm: str) -> np.ndarray | None:
        return self.bias(norm)


class Linears(Protocol):
    """Writes linear layers that share the input `x` as one product; returns the edge of their outputs, one
    behind the other."""

    def __call__(self, graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str: ...


@dataclass(frozen=True)
class Norm:
    """A norm's name and the edges of its weight and bias: RMSNorm without a bias, else LayerNorm."""

    name: str
    weight: str
    bias: str | None = None


class Target(Protocol):
    """How one engine wants the parts of a decoder written.

    `joins_linears` says that one product and slices of it are faster than a product for each layer;
    `shares_embedding` that a tied head of fp32 may read the embedding, transposed as the engine loads it.
    """

    joins_linears: bool
    shares_embedding: bool

    def begin(self, graph: GraphWriter) -> str:
        """Declare inputs and shared tensors; return the edge of the token ids."""
        ...

    def positions(self, graph: GraphWriter) -> str:
        """The edge of the tokens' positions, int64 [batch, tokens]."""
        ...

    def norm(self, graph: GraphWriter, stream: str, branch: str | None, norm: Norm) -> tuple[str, str]:
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
    walk = _Walk(graph, weights, decoder, target, linears)
    # The first output: that is where DeepSparse's pipelines look for it.
    graph.output("logits", TensorProto.FLOAT, ("batch", "tokens", decoder.vocabulary))
    stream = walk.embed(target.begin(graph))
    branch: str | None = None
    for index in range(decoder.blocks):
        stream, branch = walk.block(index, stream, branch)
        advance()
    normed, _ = target.norm(graph, stream, branch, walk.norm(decoder.family.final_norm, "final_norm"))
    logits = linears(graph, weights, normed, (decoder.family.head,))
    if decoder.logit_cap is not None:
        logits = soft_cap(graph, logits, decoder.logit_cap, "logits.capped")
    graph.node("Identity", logits, name="logits")


@dataclass(frozen=True)
class _Walk:
    graph: GraphWriter
    weights: Weights
    decoder: Decoder
    target: Target
    linears: Linears

    def embed(self, ids: str) -> str:
        family, graph = self.decoder.family, self.graph
        name = f"{family.embedding}.weight"
        embedding = graph.weight("embedding", self.weights.array(name))
        if self.target.shares_embedding:
            self.graph.shared[name] = embedding
        stream = graph.node("Gather", embedding, ids, name="embed")
        if family.scaled_embedding:
            scale = graph.scalar(self.decoder.embedding_scale)
            stream = graph.node("Mul", stream, scale, name="embed.scaled")
        if family.positions is None:
            return stream
        rows = self.weights.array(f"{family.positions}.weight")[family.first_position :]
        table = graph.weight("positions.embedding", rows)
        places = graph.node("Gather", table, self.target.positions(graph), name="embed.positions")
        return graph.node("Add", stream, places, name="embed.placed")

    def block(self, index: int, stream: str, branch: str | None) -> tuple[str, str]:
        """The residual stream before the block's MLP is added to it, and what the MLP adds."""
        family, name = self.decoder.family, self.decoder.family.block(index)
        after_attention, after_mlp = family.branch_norms or (None, None)
        norm = self.norm(f"{name}.{family.attention_norm}")
        normed, stream = self.target.norm(self.graph, stream, branch, norm)
        branch = self._normed_branch(name, after_attention, self._attention(index, normed))
        norm = self.norm(f"{name}.{family.mlp_norm}")
        normed, stream = self.target.norm(self.graph, stream, branch, norm)
        return stream, self._normed_branch(name, after_mlp, self._mlp(name, normed))

    def norm(self, module: str, name: str | None = None) -> Norm:
        name, bias = name or module, self.weights.norm_bias(module)
        return Norm(
            name,
            self.graph.weight(f"{name}.weight", self.weights.norm(module)),
            None if bias is None else self.graph.weight(f"{name}.bias", bias),
        )

    def _normed_branch(self, block: str, norm: str | None, branch: str) -> str:
        if norm is None:
            return branch
        return self.target.norm(self.graph, branch, None, self.norm(f"{block}.{norm}"))[0]

    def _attention(self, index: int, normed: str) -> str:
        decoder, name = self.decoder, self.decoder.family.block(index)
        *inputs, output = (f"{name}.{layer}" for layer in decoder.family.attention)
        keys = decoder.kv_heads * decoder.head_dim
        widths = (decoder.heads * decoder.head_dim, keys, keys)
        query, key, value = self._outputs(normed, inputs, widths)
        head_norms = None
        if decoder.family.query_key_norms:
            of_query, of_key = (self.norm(f"{name}.{part}") for part in decoder.family.query_key_norms)
            head_norms = of_query.weight, of_key.weight
        attended = self.target.attention(self.graph, index, query, key, value, head_norms)
        return self.linears(self.graph, self.weights, attended, (output,))

    def _mlp(self, block: str, normed: str) -> str:
        decoder = self.decoder
        *inputs, output = (f"{block}.{layer}" for layer in decoder.family.mlp)
        if decoder.family.gated:
            gate, up = self._outputs(normed, inputs, (decoder.intermediate,) * 2)
            gate = activate(self.graph, gate, decoder.activation)
            inner = self.graph.node("Mul", gate, up, name=f"{block}.mlp.product")
        else:
            up = self.linears(self.graph, self.weights, normed, inputs)
            inner = activate(self.graph, up, decoder.activation)
        return self.linears(self.graph, self.weights, inner, (output,))

    def _outputs(self, x: str, layers: Sequence[str], widths: Sequence[int]) -> tuple[str, ...]:
        """The outputs of these `widths`, be it of as many layers or of one that has them all."""
        if len(layers) == len(widths) and not self.target.joins_linears:
            return tuple(self.linears(self.graph, self.weights, x, (layer,)) for layer in layers)
        joined = self.linears(self.graph, self.weights, x, layers)
        ends = np.cumsum(widths).tolist()
        return tuple(
            self.graph.slice(joined, end - width, end, axis=2, name=f"{joined}.{part}")
            for part, (width, end) in enumerate(zip(widths, ends, strict=True))
        )


def write_norm(graph: GraphWriter, x: str, norm: Norm, epsilon: float) -> str:
    """A norm over the last axis in primitive operators."""
    if norm.bias is None:
        return rms_norm(graph, x, norm.weight, epsilon, norm.name)
    mean = graph.node("ReduceMean", x, name=f"{norm.name}.centre", axes=[-1], keepdims=1)
    centred = graph.node("Sub", x, mean, name=f"{norm.name}.centred")
    scaled = rms_norm(graph, centred, norm.weight, epsilon, f"{norm.name}.scaled")
    return graph.node("Add", scaled, norm.bias, name=norm.name)


def rms_norm(graph: GraphWriter, x: str, weight: str, epsilon: float, name: str) -> str:
    """RMSNorm over the last axis in primitive operators: x / sqrt(mean(x^2) + epsilon) * weight."""
    square = graph.node("Pow", x, graph.scalar(2.0), name=f"{name}.square")
    mean = graph.node("ReduceMean", square, name=f"{name}.mean", axes=[-1], keepdims=1)
    root = graph.node(
        "Sqrt", graph.node("Add", mean, graph.scalar(epsilon), name=f"{name}.shift"), name=f"{name}.rms"
    )
    return graph.node("Mul", graph.node("Div", x, root, name=f"{name}.unit"), weight, name=name)


def fp32_linears(graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str:
    """A plain matrix product; the weight is stored [in, out], as MatMul wants it, unless the graph has it."""
    name = joint_name(layers)
    if edge := graph.shared.get(weights.weight_name(layers[0])):
        matrix = graph.node("Transpose", edge, name=f"{name}.weight", perm=[1, 0])
    else:
        stacked = np.concatenate([weights.linear(layer) for layer in layers])
        matrix = graph.weight(f"{name}.weight", stacked.T)
    return add_biases(graph, weights, graph.node("MatMul", x, matrix, name=name), layers)


def keeping_fp32(linears: Linears, kept: Collection[str]) -> Linears:
    """`linears`, but the layers in `kept` as plain matrix products. Those that share an input must agree."""

    def write(graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str:
        return (fp32_linears if layers[0] in kept else linears)(graph, weights, x, layers)

    return write


def joint_name(layers: Sequence[str]) -> str:
    """The name of layers that are written as one; `layers_of` takes it apart."""
    return "+".join(layers)


def layers_of(name: str) -> list[str]:
    return name.split("+")


def joint_quantized(weights: Weights, layers: Sequence[str], grid: Grid) -> Quantized:
    """The weights of layers on a grid, one behind the other; each output channel has its own scales."""
    parts = [weights.quantized(layer, grid) for layer in layers]
    levels, scale = (
        np.concatenate(arrays) for arrays in zip(*((p.levels, p.scale) for p in parts), strict=True)
    )
    return Quantized(levels, scale, grid)


def add_biases(graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str:
    """Add the biases of the layers that have one."""
    biases = [weights.bias(layer) for layer in layers]
    if all(bias is None for bias in biases):
        return x
    rows = (
        np.zeros(len(weights.linear(layer)), np.float32) if bias is None else bias
        for layer, bias in zip(layers, biases, strict=True)
    )
    name = joint_name(layers)
    return graph.node(
        "Add", x, graph.weight(f"{name}.bias", np.concatenate(list(rows))), name=f"{name}.biased"
    )
