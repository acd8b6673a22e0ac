"""Whether an engine may be given a graph file: what it reads besides, and which format it is in.

A graph may have come from elsewhere. An engine that is told to read weights from "../../etc/passwd" does so,
and one that does not know a newer operator set may compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from ..errors import UserError, first_line
from . import deepsparse, onnxruntime


def require_loadable(model: Path, engine: str) -> tuple[str, ...]:
    """The names of the files beside `model` that hold its weights, none for a file that is not ONNX.

    Raises UserError when it is no ONNX graph, when it names weights anywhere but in a file beside it, and
    when its operator set or format is newer than `engine` reads.
    """
    if model.suffix != ".onnx":
        return ()
    try:
        graph = onnx.load(str(model), load_external_data=False)
    except DecodeError:
        raise UserError(f"{model} is no ONNX graph; export it again") from None
    locations = tuple(dict.fromkeys(_location(tensor, model) for tensor in _stored_outside(graph)))
    for location in locations:
        if not _is_beside(location):
            raise UserError(f"{model} reads {location!r}, which is not a file beside it; do not trust it")
    _require_known_format(graph, model, engine)
    return locations


def _location(tensor: TensorProto, model: Path) -> str:
    try:
        return ExternalDataInfo(tensor).location
    except ValueError as error:
        reason = first_line(error)
        raise UserError(f"{model} does not say where {tensor.name} is ({reason}); export it again") from None


def _is_beside(location: str) -> bool:
    return location not in ("", "..") and PurePosixPath(location).name == location and "\\" not in location


def _stored_outside(model: onnx.ModelProto) -> Iterator[TensorProto]:
    yield from filter(uses_external_data, _tensors_of_graph(model.graph))
    for function in model.functions:
        for node in function.node:
            yield from filter(uses_external_data, _tensors_of_node(node))


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(inner)


def _require_known_format(graph: onnx.ModelProto, model: Path, engine: str) -> None:
    opset = max((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    written = deepsparse if engine == "deepsparse" else onnxruntime
    if opset <= written.OPSET and graph.ir_version <= written.IR_VERSION:
        return
    found = f"{model} has operator set {opset} and IR version {graph.ir_version}"
    if engine == "deepsparse":
        raise UserError(
            f"{found}; DeepSparse reads up to {deepsparse.OPSET} and {deepsparse.IR_VERSION}; export it again"
        )
    if refused := _refused_by_onnxruntime(opset, graph.ir_version):
        raise UserError(f"{found}, which ONNX Runtime does not read ({refused}); export it again")


def _refused_by_onnxruntime(opset: int, ir_version: int) -> str | None:
    """What the ONNX Runtime that is installed says of the smallest graph of that format, if it refuses it."""
    import onnxruntime as engine

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    try:
        engine.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class of their own
        return first_line(error)
    return None
