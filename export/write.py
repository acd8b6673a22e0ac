"""Write one graph: choose the engine's target and the precision's linears, and walk the decoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..families import Decoder, Outline
from . import deepsparse, gguf, onnxruntime, traced
from .decoder import Linears, Weights, fp32_linears, keeping_fp32, write_decoder
from .graph import GraphWriter
from .plan import Graph
from .rotary import tables_by_block


@dataclass(frozen=True)
class Written:
    model: Path
    weight_bytes: int
    opset: int | None
    notes: tuple[str, ...]


def write_graph(
    folder: Path,
    graph: Graph,
    weights: Weights,
    decoder: Outline,
    config: Any,
    advance: Callable[[], None],
    kept: Collection[str] = (),
    input_scales: Mapping[str, float] | None = None,
) -> Written:
    """Write `graph` below `folder`; `advance` is called after each decoder block. Layers in `kept` are fp32.
    `input_scales` are those of static int8 activations, by layer; without, each token has its own.

    Peak memory is the largest tensor in fp32, once as read and once as stored; for families that are not
    described it is the whole model in fp32 and more, see `traced`.
    """
    if graph.engine == "llamacpp":
        assert isinstance(decoder, Decoder), "others are refused before: see traced.require_exportable"
        return _write_gguf(folder, graph, weights, decoder, config, advance, kept)
    linears, notes = _linears(graph, decoder.family.head, input_scales)
    if not isinstance(decoder, Decoder):
        writer = GraphWriter(folder, opset=traced.OPSET, ir_version=onnxruntime.IR_VERSION, microsoft=True)
        traced.write_traced(writer, weights, decoder, config, keeping_fp32(linears, kept), advance)
        model = writer.close(f"{decoder.family.name} decoder, {graph.label}", traced.METADATA)
        return Written(model, writer.weight_bytes, writer.opset, (*notes, *traced.NOTES))
    tables = tables_by_block(config, decoder, decoder.max_positions)
    if graph.engine == "deepsparse":
        writer = GraphWriter(folder, opset=deepsparse.OPSET, ir_version=deepsparse.IR_VERSION)
        dynamic = graph.int8_inputs and input_scales is None
        target: Any = deepsparse.DeepSparseTarget(decoder, tables, detach_output=dynamic)
    else:
        writer = GraphWriter(
            folder, opset=onnxruntime.OPSET, ir_version=onnxruntime.IR_VERSION, microsoft=True
        )
        target = onnxruntime.OnnxRuntimeTarget(decoder, tables)
    if decoder.max_positions < config.max_position_embeddings:
        notes += (f"positions end at {decoder.max_positions}, where longer texts would change all angles",)
    write_decoder(writer, weights, decoder, target, keeping_fp32(linears, kept), advance)
    model = writer.close(f"{decoder.family.name} decoder, {graph.label}")
    return Written(model, writer.weight_bytes, writer.opset, notes)


def _write_gguf(
    folder: Path,
    graph: Graph,
    weights: Weights,
    decoder: Decoder,
    config: Any,
    advance: Callable[[], None],
    kept: Collection[str],
) -> Written:
    model, size = gguf.write_gguf(folder, graph, weights, decoder, config, advance, kept)
    rounded = "rounded by GPTQ" if graph.calibrated else "rounded to nearest"
    schemes = {
        "int8": (f"weights: Q8_0, one scale per {gguf.BLOCK} inputs, {rounded}",),
        "int4": (f"weights: Q4_0, one scale per {gguf.BLOCK} inputs, {rounded}; embedding: Q8_0",),
    }
    notes = (*schemes.get(graph.precision, ()), "the GGUF file has no vocabulary: it is for token ids")
    return Written(model, size, None, notes)


def _linears(
    graph: Graph, head: str, input_scales: Mapping[str, float] | None
) -> tuple[Linears, tuple[str, ...]]:
    grid = graph.grid
    if grid is None or graph.head_grid is None:
        return fp32_linears, ()
    rounded = "rounded by GPTQ" if graph.calibrated else "rounded to nearest"
    if graph.engine == "onnxruntime":
        scheme = f"weights: {grid.bits} bit, one scale per {grid.block} inputs, {rounded}"
        return onnxruntime.BlockLinears(grid), (scheme,)
    scheme = (
        f"{'smoothed; ' if graph.smooth else ''}weights: {grid.bits} bit, one scale per channel, {rounded}; "
        f"activations: int8, one scale per {'token' if input_scales is None else 'layer, calibrated'}"
    )
    slow = (
        ("DeepSparse has no 4-bit kernel: this runs at int8 speed, and its head has 8 bits",)
        if grid.bits == 4
        else ()
    )
    return deepsparse.Int8Linears(grid, head, graph.head_grid, input_scales), (scheme, *slow)
