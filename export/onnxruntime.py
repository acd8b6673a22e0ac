"""Decoder graphs for ONNX Runtime: its fused operators, so that the dense baseline is no straw man.

Inputs, as optimum and onnxruntime-genai feed them: input_ids [batch, tokens] and attention_mask
[batch, length] (int64), past_key_values.{i}.{key,value} float32 [batch, kv_heads, past, head_dim].
GroupQueryAttention rotates, appends to the cache and attends; when past and present are bound to
one buffer, it appends in place. It takes as many tokens of a row as the mask has ones there, from its first
one on: the texts of a batch must be of one length, or padded on the right. (On the left, as transformers'
generate wants it, their logits are wrong.)
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from onnx import TensorProto

from ..errors import UserError
from ..families import Decoder
from .decoder import Norm, Weights, add_biases, joint_name, joint_quantized, rms_norm, write_norm
from .graph import GraphWriter
from .grid import Grid
from .quantize import pack_blocks
from .rotary import Tables, gather_rows, rotate

OPSET = 17
IR_VERSION = 9
MICROSOFT = "com.microsoft"
# MatMulNBits computes in int8 at this level; its default multiplies in float and is slower.
INT8_ACCURACY = 4


def computes_windows() -> bool:
    """Whether the ONNX Runtime that is installed attends to a sliding window as it should.

    1.23, the last for Python 3.10, does not (its logits are off by as much as they are large).
    """
    return not version("onnxruntime").startswith("1.23.")


class OnnxRuntimeTarget:
    """Writes norms and attention as single fused operators. UserError for odd head sizes.

    GroupQueryAttention rotates only multiples of 16 channels of heads of a multiple of 16; for others
    the rotation is written in front of it.
    """

    joins_linears = False
    shares_embedding = True

    def __init__(self, decoder: Decoder, tables: Sequence[Tables | None]) -> None:
        if decoder.head_dim % 8:
            raise UserError(
                f"ONNX Runtime's attention takes heads of a multiple of 8, not {decoder.head_dim}; "
                "leave out --target onnxruntime and --baseline"
            )
        if any(decoder.windows) and not computes_windows():
            raise UserError(
                f"ONNX Runtime {version('onnxruntime')} computes sliding windows wrongly; use a newer one "
                "(Python 3.11 or later), or leave out --target onnxruntime and --baseline"
            )
        self.decoder = decoder
        self._tables = tables
        self._fuses_rotation = decoder.head_dim % 16 == 0 and decoder.rotary_dim % 16 == 0
        self._shared: dict[str, tuple[str, str]] = {}
        self._positions: str | None = None

    def begin(self, graph: GraphWriter) -> str:
        self._ids = graph.input("input_ids", TensorProto.INT64, ("batch", "tokens"))
        self._mask = graph.input("attention_mask", TensorProto.INT64, ("batch", "length"))
        count = graph.node("ReduceSum", self._mask, graph.constant([1]), name="length.tokens", keepdims=0)
        last = graph.node("Sub", count, graph.constant(np.array(1, np.int64)), name="length.last")
        self._last = graph.node("Cast", last, name="length.last.int32", to=TensorProto.INT32)
        shape = graph.node("Shape", self._mask, name="length.shape")
        total = graph.node("Gather", shape, graph.constant(np.array(1, np.int64)), name="length.total")
        self._total = graph.node("Cast", total, name="length.total.int32", to=TensorProto.INT32)
        return self._ids

    def positions(self, graph: GraphWriter) -> str:
        """How many tokens the mask has before each of the new ones, which are the last of it."""
        if self._positions is None:
            counted = graph.node("CumSum", self._mask, graph.constant(np.array(1)), name="positions.counted")
            places = graph.node("Sub", counted, graph.constant(np.array(1)), name="positions.all")
            tokens = graph.node("Shape", self._ids, name="positions.tokens", start=1, end=2)
            start = graph.node("Neg", tokens, name="positions.start")
            end = graph.constant([np.iinfo(np.int64).max])
            self._positions = graph.node("Slice", places, start, end, graph.constant([1]), name="positions")
        return self._positions

    def norm(self, graph: GraphWriter, stream: str, branch: str | None, norm: Norm) -> tuple[str, str]:
        epsilon = self.decoder.norm_epsilon
        if branch is None:
            return write_norm(graph, stream, norm, epsilon), stream
        kind = "SkipSimplifiedLayerNormalization" if norm.bias is None else "SkipLayerNormalization"
        outputs = graph.nodes(
            kind,
            (stream, branch, norm.weight, *([norm.bias] if norm.bias else [])),
            (norm.name, "", "", f"{norm.name}.stream"),
            name=norm.name,
            domain=MICROSOFT,
            epsilon=epsilon,
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
        of_query, of_key = head_norms or (None, None)
        query = self._prepared(graph, block, query, decoder.heads, of_query, f"{name}.query")
        key = self._prepared(graph, block, key, decoder.kv_heads, of_key, f"{name}.key")
        shape = ("batch", decoder.kv_heads, "past", decoder.head_dim)
        past = [
            graph.input(f"past_key_values.{block}.{part}", TensorProto.FLOAT, shape)
            for part in ("key", "value")
        ]
        tables = self._rotated_inside(graph, block)
        output, *present = graph.nodes(
            "GroupQueryAttention",
            (query, key, value, *past, self._last, self._total, *tables),
            (name, f"present.{block}.key", f"present.{block}.value"),
            name=name,
            domain=MICROSOFT,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            do_rotary=int(bool(tables)),
            local_window_size=decoder.windows[block] or -1,
            scale=decoder.query_scale,
            softcap=decoder.attention_cap or 0.0,
        )
        for cache in present:
            graph.output(cache, TensorProto.FLOAT, ("batch", decoder.kv_heads, "length", decoder.head_dim))
        return output

    def _rotated_inside(self, graph: GraphWriter, block: int) -> tuple[str, ...]:
        """The tables by which the attention operator itself is to rotate."""
        tables = self._tables[block]
        if tables is None or not self._fuses_rotation:
            return ()
        if tables.label not in self._shared:
            self._shared[tables.label] = (
                graph.weight(f"{tables.label}.cosine", tables.cosine),
                graph.weight(f"{tables.label}.sine", tables.sine),
            )
        return self._shared[tables.label]

    def _prepared(
        self, graph: GraphWriter, block: int, x: str, heads: int, norm: str | None, name: str
    ) -> str:
        """x [batch, tokens, heads * head_dim] with all done to its heads that the operator does not do."""
        tables = None if self._fuses_rotation else self._tables[block]
        if norm is None and tables is None:
            return x
        head_dim = self.decoder.head_dim
        x = graph.node("Reshape", x, graph.constant([0, 0, heads, head_dim]), name=f"{name}.split")
        if norm is not None:
            x = rms_norm(graph, x, norm, self.decoder.norm_epsilon, f"{name}.norm")
        if tables is not None:
            if tables.label not in self._shared:
                positions = self.positions(graph)
                self._shared[tables.label] = gather_rows(graph, tables, positions, heads_axis=2)
            x = rotate(graph, self.decoder, x, self._shared[tables.label], name)
        return graph.node("Reshape", x, graph.constant([0, 0, heads * head_dim]), name=f"{name}.joined")


class BlockLinears:
    """MatMulNBits: 4- or 8-bit weights with one scale per block of inputs, int8 arithmetic."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def __call__(self, graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str:
        name, stored = joint_name(layers), joint_quantized(weights, layers, self.grid)
        out, inputs = stored.levels.shape
        product = graph.node(
            "MatMulNBits",
            x,
            graph.weight(f"{name}.weight", pack_blocks(stored)),
            graph.weight(f"{name}.scale", stored.scale),
            name=name,
            domain=MICROSOFT,
            K=inputs,
            N=out,
            bits=self.grid.bits,
            block_size=self.grid.block,
            accuracy_level=INT8_ACCURACY,
        )
        return add_biases(graph, weights, product, layers)
