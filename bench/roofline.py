"""What one decoded token must move and compute at least, and the share of the machine's roofs that a run
reached (the roofline model: Williams, Waterman & Patterson, 2009)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import onnx
from gguf import GGMLQuantizationType
from onnx import helper

from ..families import Decoder, Outline
from ..gguf_header import read_header
from .outcome import Outcome, Workload
from .report import Environment, Roofline

PRODUCTS = ("MatMul", "MatMulInteger", "MatMulNBits")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes read and operations done per token; `position` figures are per cached position of all blocks.

    `windows` are the most positions that each block attends to, as far as they are limited and known.
    `estimated`: `weight_bytes` is a guess at a layout that is not public.
    """

    weight_bytes: float
    operations: float
    position_bytes: int
    position_operations: int
    estimated: bool = False
    windows: tuple[int | None, ...] = ()

    def attended(self, depth: float) -> float:
        """Positions that a block attends to behind `depth` cached ones, on the average of the blocks."""
        reached = [min(depth, window or depth) for window in self.windows]
        return sum(reached) / len(reached) if reached else depth


@dataclass(frozen=True)
class _Matrix:
    name: str
    elements: int
    bytes: int


def traffic_of(outcome: Outcome, decoder: Outline) -> Traffic:
    """The traffic of a run, from its graph, or from the sizes of its model where it has none."""
    windows = decoder.windows if isinstance(decoder, Decoder) else ()
    return replace(_traffic(outcome, decoder), windows=windows)


def _traffic(outcome: Outcome, decoder: Outline) -> Traffic:
    candidate = outcome.candidate
    if not candidate.model.is_file():
        return _checkpoint_traffic(candidate.weight_bytes, decoder)
    if candidate.model.suffix == ".gguf":
        return gguf_traffic(candidate.model, decoder)
    if not candidate.engine.skips_zeros:
        return graph_traffic(candidate.model, decoder)
    return graph_traffic(candidate.model, decoder, candidate.sparsity, candidate.head_sparsity)


def graph_traffic(
    model: Path, decoder: Outline, skipped: float = 0.0, skipped_of_head: float = 0.0
) -> Traffic:
    """The traffic of a graph of ours, of whose block weights the engine skips the share `skipped`.

    What an engine keeps of a sparse matrix is estimated as its nonzeros and one bit per weight, and
    never as more than the matrix.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    tied = _transposed(graph)
    tables = _tables(graph) - set(tied.values())
    sizes = {tensor.name: _bytes(tensor) for tensor in graph.initializer if tensor.name not in tables}
    # The head comes last.
    *blocks, head = _matrices(graph, sizes, tied)
    shares = [*((matrix, skipped) for matrix in blocks), (head, skipped_of_head)]
    kept = sum(_kept_bytes(matrix, share) for matrix, share in shares)
    others = sum(sizes.values()) - sum(m.bytes for m, _ in shares)
    return Traffic(
        weight_bytes=kept + others,
        operations=2 * sum((1 - share) * m.elements for m, share in shares),
        position_bytes=sum(_position_bytes(value) for value in graph.input),
        position_operations=_attention_operations(decoder),
        estimated=max(skipped, skipped_of_head) > 0,
    )


def _kept_bytes(matrix: _Matrix, skipped: float) -> float:
    return min(matrix.bytes, (1 - skipped) * matrix.bytes + matrix.elements / 8) if skipped else matrix.bytes


def gguf_traffic(model: Path, decoder: Outline) -> Traffic:
    """That of a GGUF file: all of it, zeros too, but the embedding unless it is the head as well. The cache
    is in float16, or in float32 for a file of float32."""
    tensors = read_header(model).tensors
    is_float = all(tensor.quantization == GGMLQuantizationType.F32 for tensor in tensors.values())
    read = [t for t in tensors.values() if t.name != "token_embd.weight" or "output.weight" not in tensors]
    return Traffic(
        weight_bytes=sum(tensor.bytes for tensor in read),
        operations=2 * sum(prod(tensor.shape) for tensor in read if len(tensor.shape) == 2),
        position_bytes=2 * (4 if is_float else 2) * decoder.blocks * decoder.kv_heads * decoder.head_dim,
        position_operations=_attention_operations(decoder),
    )


def _checkpoint_traffic(weight_bytes: int, decoder: Outline) -> Traffic:
    """That of torch, in fp32: all weights, zeros too, but the embedding unless it is the head as well."""
    table = 0 if decoder.tied_embeddings else FLOAT_BYTES * decoder.vocabulary * decoder.hidden
    return Traffic(
        weight_bytes=weight_bytes - table,
        operations=2 * (weight_bytes - table) / FLOAT_BYTES,
        position_bytes=2 * FLOAT_BYTES * decoder.blocks * decoder.kv_heads * decoder.head_dim,
        position_operations=_attention_operations(decoder),
    )


def roofline(
    traffic: Traffic, workload: Workload, precision: str, tpot_ms: float, environment: Environment
) -> Roofline:
    """The share of the roofs that `tpot_ms` per token comes to."""
    # Tokens after the first are decoded behind the prompt and all tokens before them.
    depth = traffic.attended(len(workload.ids) + workload.new_tokens / 2)
    return under_roofs(
        traffic.weight_bytes,
        depth * traffic.position_bytes,
        traffic.operations + depth * traffic.position_operations,
        traffic.estimated,
        precision,
        tpot_ms,
        environment,
    )


def under_roofs(
    weight_bytes: float,
    kv_bytes: float,
    operations: float,
    estimated: bool,
    precision: str,
    tpot_ms: float,
    environment: Environment,
) -> Roofline:
    """The same from what a token moves and computes."""
    gbps, gops = (amount / tpot_ms / 1e6 for amount in (weight_bytes + kv_bytes, operations))
    peak = environment.peak_fp32_gops if precision == "fp32" else environment.peak_int8_gops
    bandwidth_share = gbps / environment.memory_bandwidth_gbps
    compute_share = gops / peak if peak else None
    bound: Literal["bandwidth", "compute"] = (
        "compute" if compute_share and compute_share > bandwidth_share else "bandwidth"
    )
    return Roofline(
        weight_bytes=round(weight_bytes),
        kv_bytes=round(kv_bytes),
        operations=round(operations),
        estimated=estimated,
        gbps=gbps,
        gops=gops,
        bandwidth_share=bandwidth_share,
        compute_share=compute_share,
        bound=bound,
    )


def _attention_operations(decoder: Outline) -> int:
    """Per cached position: a product with each key and one with each value, in every head."""
    return 4 * decoder.blocks * decoder.heads * decoder.head_dim


def _tables(graph: onnx.GraphProto) -> set[str]:
    """Initializers of which a token reads one row: embeddings, and the angles of the rotary one."""
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    rotated = {
        name for node in graph.node if node.op_type == "GroupQueryAttention" for name in node.input[7:9]
    }
    return gathered | rotated


def _transposed(graph: onnx.GraphProto) -> dict[str, str]:
    """The initializer behind each edge that is one transposed: an embedding that serves as head."""
    stored = {tensor.name for tensor in graph.initializer}
    return {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in stored
    }


def _matrices(graph: onnx.GraphProto, sizes: dict[str, int], tied: dict[str, str]) -> Iterator[_Matrix]:
    """The matrices that tokens are multiplied by, in the order of the graph."""
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        name = tied.get(node.input[1], node.input[1]) if len(node.input) > 1 else ""
        if node.op_type in PRODUCTS and name in sizes:
            sides = {entry.name: entry.i for entry in node.attribute}
            elements = sides["K"] * sides["N"] if node.op_type == "MatMulNBits" else prod(dims[name])
            yield _Matrix(name, elements, sizes[name])


def _bytes(tensor: onnx.TensorProto) -> int:
    return prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _position_bytes(value: onnx.ValueInfoProto) -> int:
    """Bytes that one position takes in a past input [batch, heads, past, head_dim]; 0 for other inputs."""
    if not value.name.startswith("past_key_values."):
        return 0
    kind = value.type.tensor_type
    _, heads, _, head_dim = (dim.dim_value for dim in kind.shape.dim)
    return heads * head_dim * int(helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize)
