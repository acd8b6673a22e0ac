"""Decoder graphs for ONNX Runtime: its fused operators, so that the dense baseline is no straw man.

Inputs, as optimum and onnxruntime-genai feed them: input_ids [batch, tokens] and attention_mask
[batch, length] (int64), past_key_values.{i}.{key,value} float32 [batch, kv_heads, past, head_dim].
GroupQueryAttention rotates, appends to the cache and attends; when past and present are bound to
one buffer, it appends in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from ..errors import UserError
from ..families import Decoder
from .decoder import Weights, add_bias, rms_norm
from .graph import GraphWriter
from .quantize import quantize_per_block

OPSET = 17
IR_VERSION = 9
MICROSOFT = "com.microsoft"
# MatMulNBits computes in int8 at this level; its default multiplies in float and is slower.
INT8_ACCURACY = 4


class OnnxRuntimeTarget:
    """Writes norms and attention as single fused operators. UserError for odd head sizes."""

    def __init__(self, decoder: Decoder, cosine: np.ndarray, sine: np.ndarray) -> None:
        if decoder.head_dim % 16:
            raise UserError(
                f"ONNX Runtime's attention takes heads of a multiple of 16, not {decoder.head_dim}; "
                "leave out --target onnxruntime and --baseline"
            )
        self.decoder = decoder
        self._tables = (cosine, sine)

    def begin(self, graph: GraphWriter) -> str:
        ids = graph.input("input_ids", TensorProto.INT64, ("batch", "tokens"))
        mask = graph.input("attention_mask", TensorProto.INT64, ("batch", "length"))
        count = graph.node("ReduceSum", mask, graph.constant([1]), name="length.tokens", keepdims=0)
        last = graph.node("Sub", count, graph.constant(np.array(1, np.int64)), name="length.last")
        self._last = graph.node("Cast", last, name="length.last.int32", to=TensorProto.INT32)
        shape = graph.node("Shape", mask, name="length.shape")
        total = graph.node("Gather", shape, graph.constant(np.array(1, np.int64)), name="length.total")
        self._total = graph.node("Cast", total, name="length.total.int32", to=TensorProto.INT32)
        cosine, sine = self._tables
        self._cosine = graph.weight("rotary.cosine", cosine)
        self._sine = graph.weight("rotary.sine", sine)
        return ids

    def norm(
        self, graph: GraphWriter, stream: str, branch: str | None, weight: str, name: str
    ) -> tuple[str, str]:
        if branch is None:
            return rms_norm(graph, stream, weight, self.decoder.norm_epsilon, name), stream
        outputs = graph.nodes(
            "SkipSimplifiedLayerNormalization",
            (stream, branch, weight),
            (name, "", "", f"{name}.stream"),
            name=name,
            domain=MICROSOFT,
            epsilon=self.decoder.norm_epsilon,
        )
        return outputs[0], outputs[3]

    def attention(
        self,
        graph: GraphWriter,
        block: int,
        query: str,
        key: str,
        value: str,
        head_norms: tuple[str, str] | None,
    ) -> str:
        name, decoder = f"attention.{block}", self.decoder
        if head_norms:
            query = self._norm_heads(graph, query, decoder.heads, head_norms[0], f"{name}.query")
            key = self._norm_heads(graph, key, decoder.kv_heads, head_norms[1], f"{name}.key")
        shape = ("batch", decoder.kv_heads, "past", decoder.head_dim)
        past = [
            graph.input(f"past_key_values.{block}.{part}", TensorProto.FLOAT, shape)
            for part in ("key", "value")
        ]
        output, *present = graph.nodes(
            "GroupQueryAttention",
            (query, key, value, *past, self._last, self._total, self._cosine, self._sine),
            (name, f"present.{block}.key", f"present.{block}.value"),
            name=name,
            domain=MICROSOFT,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            do_rotary=1,
            local_window_size=decoder.sliding_window or -1,
        )
        for cache in present:
            graph.output(cache, TensorProto.FLOAT, ("batch", decoder.kv_heads, "length", decoder.head_dim))
        return output

    def _norm_heads(self, graph: GraphWriter, x: str, heads: int, weight: str, name: str) -> str:
        split = graph.node(
            "Reshape", x, graph.constant([0, 0, heads, self.decoder.head_dim]), name=f"{name}.split"
        )
        normed = rms_norm(graph, split, weight, self.decoder.norm_epsilon, f"{name}.norm")
        return graph.node(
            "Reshape", normed, graph.constant([0, 0, heads * self.decoder.head_dim]), name=f"{name}.joined"
        )


class BlockLinears:
    """MatMulNBits: 4- or 8-bit weights with one scale per `block` inputs, int8 arithmetic."""

    def __init__(self, bits: int, block: int) -> None:
        self.bits = bits
        self.block = block

    def __call__(
        self, graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]
    ) -> tuple[str, ...]:
        return tuple(
            add_bias(graph, weights, self._product(graph, weights, x, layer), layer) for layer in layers
        )

    def _product(self, graph: GraphWriter, weights: Weights, x: str, layer: str) -> str:
        weight = weights.linear(layer)
        stored = quantize_per_block(weight, self.bits, self.block)
        return graph.node(
            "MatMulNBits",
            x,
            graph.weight(f"{layer}.weight", stored.packed),
            graph.weight(f"{layer}.scale", stored.scale),
            name=layer,
            domain=MICROSOFT,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=self.bits,
            block_size=self.block,
            accuracy_level=INT8_ACCURACY,
        )
