"""A graph is looked at before an engine gets it: where its weights are, and which format it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from dlp_deploy.errors import UserError
from dlp_deploy.export.loadable import require_loadable

from .artifacts import pruned, with_graphs


@pytest.fixture
def artifact(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    return with_graphs(pruned(tiny_checkpoint("llama"), tmp_path / "a"), "fp32", "deepsparse,onnxruntime")


def altered(model: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    graph = onnx.load(str(model), load_external_data=False)
    change(graph)
    onnx.save(graph, str(model))
    return model


def locate(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name

    return change


def misplace(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


def hide_in_a_branch(graph: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../elsewhere")
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    graph.graph.node.append(onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))


@pytest.mark.parametrize("engine", ["deepsparse", "onnxruntime"])
def test_what_was_exported_is_loadable(engine: str, artifact: Path) -> None:
    assert require_loadable(artifact / engine / "model.onnx", engine) == ("model.onnx.data",)


@pytest.mark.parametrize("name", ["../model.onnx.data", "/etc/passwd", "sub/data", "..", "", "a\\b"])
def test_weights_elsewhere_are_refused(name: str, artifact: Path) -> None:
    model = altered(artifact / "onnxruntime" / "model.onnx", locate(name))
    with pytest.raises(UserError, match="not a file beside it"):
        require_loadable(model, "onnxruntime")


@pytest.mark.parametrize(("key", "value"), [("offset", "here"), ("offset", "-1"), ("length", "-8")])
def test_weights_at_no_place_are_refused(key: str, value: str, artifact: Path) -> None:
    model = altered(artifact / "onnxruntime" / "model.onnx", misplace(key, value))
    with pytest.raises(UserError, match=r"model\.onnx does not say where embedding is .*; export it again"):
        require_loadable(model, "onnxruntime")


def test_weights_elsewhere_are_found_in_inner_graphs(artifact: Path) -> None:
    model = altered(artifact / "onnxruntime" / "model.onnx", hide_in_a_branch)
    with pytest.raises(UserError, match=r"'\.\./elsewhere'"):
        require_loadable(model, "onnxruntime")


def test_a_file_that_is_no_graph_is_refused(artifact: Path) -> None:
    model = artifact / "onnxruntime" / "model.onnx"
    model.write_bytes(b"\xff\xff not a graph")
    with pytest.raises(UserError, match="no ONNX graph"):
        require_loadable(model, "onnxruntime")


@pytest.mark.parametrize(("engine", "opset", "ir"), [("deepsparse", 17, 7), ("deepsparse", 13, 9)])
def test_a_format_too_new_for_deepsparse(engine: str, opset: int, ir: int, artifact: Path) -> None:
    def newer(graph: onnx.ModelProto) -> None:
        graph.opset_import[0].version, graph.ir_version = opset, ir

    model = altered(artifact / engine / "model.onnx", newer)
    with pytest.raises(UserError, match=f"operator set {opset} and IR version {ir}"):
        require_loadable(model, engine)


def test_a_format_too_new_for_onnx_runtime_is_what_it_refuses_itself(artifact: Path) -> None:
    def newer(graph: onnx.ModelProto) -> None:
        graph.ir_version = 12345

    model = altered(artifact / "onnxruntime" / "model.onnx", lambda graph: None)
    altered(model, lambda graph: setattr(graph.opset_import[0], "version", 18))
    require_loadable(model, "onnxruntime")
    with pytest.raises(UserError, match="which ONNX Runtime does not read"):
        require_loadable(altered(model, newer), "onnxruntime")
