"""Write one graph: choose the engine's target and the precision's linears, and walk the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..families import Decoder
from . import deepsparse, onnxruntime
from .decoder import Linears, Weights, write_decoder
from .graph import GraphWriter
from .plan import Graph
from .rotary import tables_by_block

# Inputs that share a scale in MatMulNBits. 32 is its finest and most accurate block.
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Written:
    model: Path
    weight_bytes: int
    opset: int
    notes: tuple[str, ...]


def write_graph(
    folder: Path, graph: Graph, weights: Weights, decoder: Decoder, config: Any, advance: Callable[[], None]
) -> Written:
    """Write `graph` below `folder`; `advance` is called after each decoder block.

    Peak memory is the largest tensor in fp32, once as read and once as stored.
    """
    tables = tables_by_block(config, decoder, decoder.max_positions)
    linears, notes = _linears(graph)
    if graph.engine == "deepsparse":
        writer = GraphWriter(folder, opset=deepsparse.OPSET, ir_version=deepsparse.IR_VERSION)
        dynamic = graph.precision != "fp32"
        target: Any = deepsparse.DeepSparseTarget(decoder, tables, detach_output=dynamic)
    else:
        writer = GraphWriter(
            folder, opset=onnxruntime.OPSET, ir_version=onnxruntime.IR_VERSION, microsoft=True
        )
        target = onnxruntime.OnnxRuntimeTarget(decoder, tables)
    if decoder.max_positions < config.max_position_embeddings:
        notes += (f"positions end at {decoder.max_positions}, where longer texts would change all angles",)
    write_decoder(writer, weights, decoder, target, linears, advance)
    model = writer.close(f"{decoder.family.name} decoder, {graph.label}")
    return Written(model, writer.weight_bytes, writer.opset, notes)


def _linears(graph: Graph) -> tuple[Linears, tuple[str, ...]]:
    if graph.precision == "fp32":
        return deepsparse.fp32_linears, ()
    bits = 8 if graph.precision == "int8" else 4
    if graph.engine == "onnxruntime":
        return onnxruntime.BlockLinears(bits, BLOCK_SIZE), (
            f"weights: {bits} bit, one scale per {BLOCK_SIZE} inputs",
        )
    scheme = f"smoothed; weights: {bits} bit, one scale per channel; activations: int8, one scale per token"
    if bits == 4:
        return deepsparse.Int8Linears(bits=4), (
            scheme,
            "DeepSparse has no 4-bit kernel: this runs at int8 speed",
        )
    return deepsparse.Int8Linears(), (scheme,)
