"""Graphs of decoders that families.py does not describe: traced by optimum's exporter.

Its graph is taken as it is but for the products with the model's linear layers, which are found by their
weights: each is written anew in the precision that was asked for, under the layer's name. So a weight that
the trace had changed would not be found, and zeros are counted as in any other graph.

The exporter holds the whole model in memory, more than once: nothing here is streamed.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from ..bench.cgroups import available_memory
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import UserError, first_line
from ..families import Outline, architectures_of, is_described
from ..models import ModelFiles, load_config
from ..progress import say
from ..storage import TRACED_PREFIX
from ..weightless import model_without_weights
from .decoder import Linears, Weights, joint_name
from .graph import GraphWriter
from .grid import Grid
from .plan import Graph
from .quantize import Quantized

# LayerNormalization is one operator from here on.
OPSET = 17
TASK = "text-generation-with-past"
PRODUCTS = ("MatMul", "Gemm")
# Peak memory over that of the weights in float32, as measured on a GPT-NeoX of 55 million parameters.
COPIES = 4.5
GIB = 1 << 30
# Read by the worker that runs the graph: past and present are no shared buffers.
METADATA = {"kv_cache": "concatenated"}
NOTES = (
    "traced by optimum's exporter: attention is not fused, and the KV cache is copied for every token, "
    "so ONNX Runtime is not at its best here",
)


def require_exportable(files: ModelFiles, graphs: Collection[Graph]) -> None:
    """Raise UserError when there is no way to export a model to one of `graphs`, before hours of pruning."""
    config = load_config(files)
    if is_described(config) or not graphs:
        return
    architecture = architectures_of(config)[0]
    if any(graph.engine == "deepsparse" for graph in graphs):
        raise UserError(
            f"{architecture} goes through optimum's exporter, and DeepSparse's KV cache does not take its "
            "graphs; give --target onnxruntime"
        )
    if any(graph.engine == "llamacpp" for graph in graphs):
        raise UserError(
            f"{architecture} is not written for llama.cpp; leave out llamacpp in --target and --baseline"
        )
    if not _optimum_knows(config.model_type):
        raise UserError(
            f"optimum's exporter does not know {architecture}: it can be pruned (dlp-deploy prune) and "
            "evaluated in torch, but not exported"
        )
    needed, free = _memory_needed(open_checkpoint(files)), available_memory()
    held = f"{architecture} goes through optimum's exporter, which holds the whole model in memory"
    if free < needed:
        raise UserError(
            f"{held}: about {needed / GIB:.1f} GiB, with {free / GIB:.1f} GiB free; use a larger machine"
        )
    say(f"{held}: about {needed / GIB:.1f} GiB")


def _memory_needed(checkpoint: Checkpoint) -> float:
    return COPIES * 4 * sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def _optimum_knows(model_type: str) -> bool:
    from optimum.exporters.onnx import model_configs  # noqa: F401 (its import fills the table)
    from optimum.exporters.tasks import TasksManager

    try:
        return TASK in TasksManager.get_supported_tasks_for_model_type(
            model_type, "onnx", library_name="transformers"
        )
    except KeyError:
        return False


def write_traced(
    writer: GraphWriter,
    weights: Weights,
    outline: Outline,
    config: Any,
    linears: Linears,
    advance: Callable[[], None],
) -> None:
    """Trace the model and write its graph with `linears` in place of its linear layers.

    `advance` is called after each decoder block. Raises UserError when it cannot be traced.
    """
    with TemporaryDirectory(dir=writer.folder.parent, prefix=TRACED_PREFIX) as place:
        traced = _Traced(_trace(weights, outline, config, Path(place)))
        _Rewriting(writer, weights, outline, linears, traced, advance).write()


def _trace(weights: Weights, outline: Outline, config: Any, folder: Path) -> Path:
    from optimum.exporters.onnx import onnx_export_from_model

    with _quiet():
        try:
            onnx_export_from_model(
                _model_in_memory(weights, outline, config),
                folder,
                opset=OPSET,
                task=TASK,
                do_validation=False,
            )
        except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise UserError(
                f"optimum's exporter cannot trace {architectures_of(config)[0]}: {first_line(error)}"
            ) from None
    return folder / "model.onnx"


def _model_in_memory(weights: Weights, outline: Outline, config: Any) -> Any:
    model: Any = model_without_weights(config)
    state = {name: torch.from_numpy(weights.array(name)) for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    if outline.tied_embeddings:
        model.tie_weights()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The tracer warns of every branch that it fixes, whose effect the check of the logits is there for."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _Traced:
    """A graph that optimum wrote, its initializers read when they are asked for."""

    def __init__(self, model: Path) -> None:
        self.folder = model.parent
        self.graph = onnx.load(str(model), load_external_data=False).graph
        self._tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self._transposes = {
            node.output[0]: node.input[0]
            for node in self.graph.node
            if node.op_type == "Transpose" and node.input[0] in self._tensors
        }

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._tensors[name], base_dir=str(self.folder))

    def initializers(self) -> list[str]:
        return list(self._tensors)

    def factor(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The matrix [in, out] that a product multiplies by, where it is a stored one."""
        if node.op_type not in PRODUCTS:
            return None
        name = self._transposes.get(node.input[1], node.input[1])
        if name not in self._tensors or len(self._tensors[name].dims) != 2:
            return None
        turned = (name != node.input[1]) != _is_turned(node)
        return self.array(name).T if turned else self.array(name)


def _is_turned(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in node.attribute)


@dataclass(frozen=True)
class _Unbiased(Weights):
    """Weights of linear layers whose biases the traced graph adds itself."""

    weights: Weights

    def array(self, name: str) -> np.ndarray:
        return self.weights.array(name)

    def weight_name(self, layer: str) -> str:
        return self.weights.weight_name(layer)

    def linear(self, layer: str) -> np.ndarray:
        return self.weights.linear(layer)

    def quantized(self, layer: str, grid: Grid) -> Quantized:
        return self.weights.quantized(layer, grid)

    def bias(self, layer: str) -> None:
        return None


class _Rewriting:
    def __init__(
        self,
        writer: GraphWriter,
        weights: Weights,
        outline: Outline,
        linears: Linears,
        traced: _Traced,
        advance: Callable[[], None],
    ) -> None:
        self.writer, self.weights, self.outline = writer, _Unbiased(weights), outline
        self.linears, self.traced, self.advance = linears, traced, advance

    def write(self) -> None:
        graph = self.traced.graph
        for value in graph.input:
            self.writer.input(value.name, *_type_of(value))
        for value in graph.output:
            self.writer.output(value.name, *_type_of(value))
        layer_of = self._layers_of_products()
        used = {name for node in graph.node for name in _read_by(node, layer_of)}
        used |= {value.name for value in graph.output}
        for name in self.traced.initializers():
            if name in used:
                self.writer.weight(name, self.traced.array(name))
        for node in graph.node:
            if node.output[0] in layer_of:
                self._write_layer(node, layer_of[node.output[0]])
            elif used.intersection(node.output):
                self.writer.copy(node)

    def _layers_of_products(self) -> dict[str, str]:
        """By the output of each product with a linear layer's weight: the name of the layer.

        Equal weights, such as those of layers without a nonzero, are told apart by their order.
        """
        waiting: dict[str, list[str]] = defaultdict(list)
        for (layer,) in self.outline.linear_groups():
            waiting[_digest(self.weights.linear(layer).T)].append(layer)
        found: dict[str, str] = {}
        for node in self.traced.graph.node:
            factor = self.traced.factor(node)
            layers = waiting.get(_digest(factor)) if factor is not None else None
            if layers:
                found[node.output[0]] = layers.pop(0)
        return found

    def _write_layer(self, node: onnx.NodeProto, layer: str) -> None:
        product = self.linears(self.writer, self.weights, node.input[0], (layer,))
        assert product == joint_name((layer,))
        if node.op_type == "Gemm" and len(node.input) == 3:
            self.writer.nodes("Add", (product, node.input[2]), node.output, name=f"{layer}.biased")
        else:
            self.writer.nodes("Identity", (product,), node.output, name=f"{layer}.product")
        if layer.endswith(f".{self.outline.family.linears[-1]}"):
            self.advance()


def _read_by(node: onnx.NodeProto, layer_of: Collection[str]) -> Iterator[str]:
    """The edges that a node reads, also in graphs inside it; a rewritten product reads no weight."""
    if node.output[0] in layer_of:
        yield node.input[0]
        yield from node.input[2:]
        return
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner, ())


def _digest(matrix: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix, np.float32).data).hexdigest()


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, list[int | str]]:
    kind = value.type.tensor_type
    return kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
