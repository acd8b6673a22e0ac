"""Decoder graphs for DeepSparse 1.8: primitive operators only, in the shapes its compiler fuses.

Inputs, as DeepSparse's own pipelines feed them (int64): input_ids [batch, tokens], attention_mask
[batch, length], positions [batch, tokens], causal_mask [batch, 1, tokens, length], and
past_key_values.{i}.{key,value} float32 [batch, heads, length - tokens, head_dim].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import TensorProto

from ..errors import UserError
from ..families import Decoder
from .activation import soft_cap
from .decoder import Norm, Weights, add_biases, joint_name, joint_quantized, rms_norm, write_norm
from .graph import GraphWriter
from .grid import Grid
from .rotary import Tables, gather_rows, rotate

# The newest operator set whose reductions take their axes as attributes, which is what the parser
# of this engine (built on onnx 1.14) was tested with.
OPSET = 13
IR_VERSION = 7
# Added to masked scores; finite, because inf - inf in a softmax over a fully masked row is nan.
MASKED = float(np.finfo(np.float32).min)
# Measured against torch with its internal cache: heads of 16, 24, 32, 48 and 64 channels are right, and of
# more these; 80, 96 and 112 are not.
NARROW_HEAD = 64
WIDE_HEADS = (128, 256)
# The engine's cache is longer than the positions: by one, and rounded up to its blocks.
SPARE_COLUMNS = 256


class DeepSparseTarget:
    """Writes attention so that the engine recognizes its internal KV cache.

    The cached Concat must feed the attention product directly, so grouped keys and values cannot be
    repeated to all heads behind it, and before it the cache would hold every head. Instead the queries
    that share a key are rows of one product.

    `detach_output` puts a Slice and Concat behind the attention. Its output may then have several
    readers, as a dynamic scale needs; without it the compiler aborts (greedy_assign_layouts.cpp).
    """

    # The engine spends more on the many small operators of a decoded token than on slicing a wide one.
    joins_linears = True
    # It keeps both copies then, and a third while it loads: 350 MB more for the 113 MB of SmolLM2-135M.
    shares_embedding = False

    def __init__(self, decoder: Decoder, tables: Sequence[Tables | None], detach_output: bool) -> None:
        if decoder.head_dim > NARROW_HEAD and decoder.head_dim not in WIDE_HEADS:
            raise UserError(
                f"DeepSparse computes heads of {decoder.head_dim} channels wrongly with its KV cache; "
                "leave out --target deepsparse"
            )
        self.decoder = decoder
        self.detach_output = detach_output
        self._tables = tables
        self._rows: dict[str, tuple[str, str]] = {}
        self._masks: dict[int | None, str] = {}
        self._distance: str | None = None

    def begin(self, graph: GraphWriter) -> str:
        ids = graph.input("input_ids", TensorProto.INT64, ("batch", "tokens"))
        self._attention_mask = graph.input("attention_mask", TensorProto.INT64, ("batch", "length"))
        self._positions = graph.input("positions", TensorProto.INT64, ("batch", "tokens"))
        causal_mask = graph.input("causal_mask", TensorProto.INT64, ("batch", 1, "tokens", "length"))
        # Cast before anything else: integer arithmetic on the masks aborts the engine when it runs.
        row = graph.node("Cast", self._attention_mask, name="attention_mask.float", to=TensorProto.FLOAT)
        row = graph.node("Unsqueeze", row, graph.constant([1, 2]), name="attention_mask.row")
        causal = graph.node("Cast", causal_mask, name="causal_mask.float", to=TensorProto.FLOAT)
        self._allowed = graph.node("Mul", causal, row, name="mask.allowed")
        return ids

    def positions(self, graph: GraphWriter) -> str:
        return self._positions

    def norm(self, graph: GraphWriter, stream: str, branch: str | None, norm: Norm) -> tuple[str, str]:
        if branch is not None:
            stream = graph.node("Add", stream, branch, name=f"{norm.name}.stream")
        return write_norm(graph, stream, norm, self.decoder.norm_epsilon), stream

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
        query_norm, key_norm = head_norms or (None, None)
        query = self._heads(graph, query, decoder.heads, f"{name}.query", query_norm)
        key = self._heads(graph, key, decoder.kv_heads, f"{name}.key", key_norm)
        value = self._heads(graph, value, decoder.kv_heads, f"{name}.value")
        query = self._rotate(graph, block, query, f"{name}.query")
        query = self._regrouped(graph, query, decoder.kv_heads, f"{name}.query.grouped")
        key = self._rotate(graph, block, key, f"{name}.key")
        keys = self._cached(graph, block, "key", key)
        values = self._cached(graph, block, "value", value)
        keys = graph.node("Transpose", keys, name=f"{name}.keys", perm=[0, 1, 3, 2])
        scores = graph.node("MatMul", query, keys, name=f"{name}.product")
        scores = graph.node("Mul", scores, graph.scalar(decoder.query_scale), name=f"{name}.scaled")
        if decoder.attention_cap is not None:
            scores = soft_cap(graph, scores, decoder.attention_cap, f"{name}.capped")
        mask = self._mask(graph, decoder.windows[block])
        scores = graph.node("Add", scores, mask, name=f"{name}.masked")
        share = graph.node("Softmax", scores, name=f"{name}.softmax", axis=-1)
        mixed = graph.node("MatMul", share, values, name=f"{name}.mixed")
        mixed = self._regrouped(graph, mixed, decoder.heads, f"{name}.mixed.heads")
        mixed = graph.node("Transpose", mixed, name=f"{name}.tokens", perm=[0, 2, 1, 3])
        width = decoder.heads * decoder.head_dim
        mixed = graph.node("Reshape", mixed, graph.constant([0, 0, width]), name=f"{name}.output")
        return self._halves(graph, mixed, width, 2, f"{name}.detached") if self.detach_output else mixed

    def _mask(self, graph: GraphWriter, window: int | None) -> str:
        """What is added to the scores of blocks with this window, [batch, 1, group * tokens, length]."""
        if window not in self._masks:
            name = "mask" if window is None else f"mask.{window}"
            allowed = self._allowed if window is None else self._latest(graph, window, name)
            blocked = graph.node("Sub", graph.scalar(1.0), allowed, name=f"{name}.blocked")
            mask = graph.node("Mul", blocked, graph.scalar(MASKED), name=f"{name}.added")
            self._masks[window] = self._for_group(graph, mask, name)
        return self._masks[window]

    def _for_group(self, graph: GraphWriter, mask: str, name: str) -> str:
        """The rows of a mask for each query head of a group. A Concat or Tile here aborts the compiler."""
        if self.decoder.group == 1:
            return mask
        copies = graph.constant([1, self.decoder.group, 1, 1])
        copied = graph.node("Expand", mask, copies, name=f"{name}.copied")
        return graph.node("Reshape", copied, graph.constant([0, 1, -1, 0]), name=name)

    def _latest(self, graph: GraphWriter, window: int, name: str) -> str:
        """1 where a key is among the latest `window` that its query may see, else 0."""
        if self._distance is None:
            self._distance = self._columns_apart(graph)
        room = graph.node("Sub", graph.scalar(float(window)), self._distance, name=f"{name}.room")
        near = graph.node("Clip", room, graph.scalar(0.0), graph.scalar(1.0), name=f"{name}.near")
        return graph.node("Mul", self._allowed, near, name=f"{name}.latest")

    def _columns_apart(self, graph: GraphWriter) -> str:
        """How far each key is behind each query, [tokens, length]: the latest are the last columns.

        It depends on shapes alone, so the engine computes it when it compiles. Counting the ones of the
        mask instead (CumSum) ends its compiler.
        """
        count = self.decoder.max_positions + SPARE_COLUMNS
        ramp = graph.weight("mask.columns", np.arange(count, dtype=np.float32))
        length = self._size(graph, self._attention_mask, "mask.length")
        tokens = self._size(graph, self._positions, "mask.tokens")
        first = graph.node("Sub", length, tokens, name="mask.first")
        keys = graph.node("Slice", ramp, graph.constant([0]), length, name="mask.keys")
        queries = graph.node("Slice", ramp, first, length, name="mask.queries.row")
        queries = graph.node("Unsqueeze", queries, graph.constant([1]), name="mask.queries")
        return graph.node("Sub", queries, keys, name="mask.distance")

    def _size(self, graph: GraphWriter, x: str, name: str) -> str:
        """The second axis of x, int64 [1]."""
        return graph.slice(graph.node("Shape", x, name=f"{name}.shape"), 1, 2, axis=0, name=name)

    def _heads(self, graph: GraphWriter, x: str, heads: int, name: str, norm: str | None = None) -> str:
        """[batch, tokens, width] as [batch, heads, tokens, head_dim]; `norm` weights a norm of each head."""
        # Zeros copy the batch and token counts: the engine overrides the input shapes at load.
        split = graph.constant([0, 0, heads, self.decoder.head_dim])
        x = graph.node("Reshape", x, split, name=f"{name}.split")
        if norm is not None:
            # Behind the Transpose the compiler aborts, if fewer keys than queries are cached.
            x = rms_norm(graph, x, norm, self.decoder.norm_epsilon, f"{name}.norm")
        return graph.node("Transpose", x, name=f"{name}.heads", perm=[0, 2, 1, 3])

    def _rotate(self, graph: GraphWriter, block: int, x: str, name: str) -> str:
        tables = self._tables[block]
        if tables is None:
            return x
        if tables.label not in self._rows:
            self._rows[tables.label] = gather_rows(graph, tables, self._positions, heads_axis=1)
        return rotate(graph, self.decoder, x, self._rows[tables.label], name)

    def _halves(self, graph: GraphWriter, x: str, width: int, axis: int, name: str) -> str:
        first = graph.slice(x, 0, width // 2, axis=axis, name=f"{name}.first")
        second = graph.slice(x, width // 2, width, axis=axis, name=f"{name}.second")
        return graph.node("Concat", first, second, name=name, axis=axis)

    def _regrouped(self, graph: GraphWriter, x: str, heads: int, name: str) -> str:
        """[batch, heads, rows, head_dim] with another number of heads; those of a key are neighbours."""
        if self.decoder.group == 1:
            return x
        return graph.node("Reshape", x, graph.constant([0, heads, -1, self.decoder.head_dim]), name=name)

    def _cached(self, graph: GraphWriter, block: int, part: str, x: str) -> str:
        heads, head_dim = self.decoder.kv_heads, self.decoder.head_dim
        past = graph.input(
            f"past_key_values.{block}.{part}", TensorProto.FLOAT, ("batch", heads, "past", head_dim)
        )
        present = graph.node("Concat", past, x, name=f"present.{block}.{part}", axis=2)
        graph.output(present, TensorProto.FLOAT, ("batch", heads, "length", head_dim))
        return present


class Int8Linears:
    """Int8 weights per output channel; activations int8 per token, measured as the model runs, or with the
    static scale that `input_scales` has for the layer.

    The operators are those that the engine fuses at full speed: QuantizeLinear around 128,
    MatMulInteger, and the two scales multiplied in behind it; one where both are known. A grid of fewer
    than 8 bits is a coarser one in the same int8 container.
    """

    def __init__(
        self, grid: Grid, head: str, head_grid: Grid, input_scales: Mapping[str, float] | None = None
    ) -> None:
        self.grid, self.head, self.head_grid = grid, head, head_grid
        self.input_scales = input_scales

    def __call__(self, graph: GraphWriter, weights: Weights, x: str, layers: Sequence[str]) -> str:
        name = joint_name(layers)
        stored = joint_quantized(weights, layers, self.head_grid if name == self.head else self.grid)
        channels = stored.scale[:, 0]
        if self.input_scales is None:
            quantized, token_scale = _quantize_per_token(graph, x, f"{name}.input")
            product = self._product(graph, quantized, stored.levels, channels, name, f"{name}.channels")
            product = graph.node("Mul", product, token_scale, name=name)
        else:
            fixed = np.float32(self.input_scales[layers[0]])
            quantized = _quantize(graph, x, fixed, f"{name}.input.uint8")
            product = self._product(graph, quantized, stored.levels, channels * fixed, name, name)
        return add_biases(graph, weights, product, layers)

    def _product(
        self, graph: GraphWriter, x: str, levels: np.ndarray, scale: np.ndarray, name: str, scaled: str
    ) -> str:
        """x, uint8 around 128, times `levels` [out, in] and `scale` [out]; the output is called `scaled`."""
        values = graph.weight(f"{name}.weight", levels.T)
        # Not shared: on processors without VNNI, ONNX Runtime rewrites it together with the weights.
        no_offset = graph.weight(f"{name}.zero_point", np.zeros((), dtype=np.int8))
        zero_points = graph.constant(_ZERO_POINT), no_offset
        product = graph.node("MatMulInteger", x, values, *zero_points, name=f"{name}.integer")
        product = graph.node("Cast", product, name=f"{name}.float", to=TensorProto.FLOAT)
        return graph.node("Mul", product, graph.weight(f"{name}.scale", scale), name=scaled)


_ZERO_POINT = np.array(128, dtype=np.uint8)
_TOP = 127.0
# The least peak of a token: one of zeros (padding) must not divide by zero.
_TINY = 1e-9


def _quantize_per_token(graph: GraphWriter, x: str, name: str) -> tuple[str, str]:
    """x as uint8 around 128, and the scale of each token, max|x| / 127.

    |x| is written Sqrt(Pow(x, 2)): with Abs the engine's internal cache gives wrong logits.
    """
    square = graph.node("Pow", x, graph.scalar(2.0), name=f"{name}.square")
    magnitude = graph.node("Sqrt", square, name=f"{name}.magnitude")
    peak = graph.node("ReduceMax", magnitude, name=f"{name}.peak", axes=[-1], keepdims=1)
    peak = graph.node("Add", peak, graph.scalar(_TINY), name=f"{name}.positive")
    scale = graph.node("Mul", peak, graph.scalar(1.0 / _TOP), name=f"{name}.scale")
    steps = graph.node("Div", x, scale, name=f"{name}.steps")
    return _quantize(graph, steps, 1.0, f"{name}.uint8"), scale


def _quantize(graph: GraphWriter, x: str, scale: float, name: str) -> str:
    """x / scale as uint8 around 128."""
    return graph.node("QuantizeLinear", x, graph.scalar(scale), graph.constant(_ZERO_POINT), name=name)
