"""What cannot be measured, or read as a report, is refused in one line before anything is measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench import bench
from dlp_deploy.bench.report import read_report
from dlp_deploy.errors import UserError

from .artifacts import sealed

QUICK: dict[str, Any] = {"cores": 1, "prompt_tokens": 20, "new_tokens": 6, "repeats": 2, "eval_windows": 0}
QUICK |= {"context": 26}


@pytest.fixture
def copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact of the test's own, to be damaged at will."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "deepspars"}, r"did you mean deepsparse\?"),
        ({"engine": "sparseml"}, "runs recipes and generates no text"),
        ({"engine": " , "}, "--engine is empty"),
        ({"baseline": "int4"}, r"no dense int4 baseline \(it has none\)"),
        ({"cores": 10_000}, "--cores 10000: this machine has"),
        ({"context": 25}, "--context 25 is too short .* use 26"),
        ({"context": 1000}, "longer than the 256 positions"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0"),
        ({"new_tokens": 1}, "--new-tokens 1"),
        ({"repeats": 0}, "--repeats 0"),
        ({"time_limit": 0}, "--time-limit 0: give seconds"),
        ({"time_limit": float("nan")}, "--time-limit nan: give seconds"),
        ({"eval_data": "no-such-text.txt"}, "no-such-text.txt"),
        ({"output": Path("run.int8")}, r"--output run\.int8: give a name that ends in \.json"),
        ({"output": Path("/proc/self/r.json")}, "/proc/self cannot be written to .* another --output"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(
    tiny_artifact: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments = {"engine": "onnxruntime", "output": tmp_path / "new" / "r.json", **QUICK, **options}
    with pytest.raises(UserError, match=message):
        bench(tiny_artifact, **arguments)
    assert not (tmp_path / "new").exists()


def test_an_altered_graph_is_refused(copy: Path, tmp_path: Path) -> None:
    with (copy / "onnxruntime" / "model.onnx.data").open("r+b") as stream:
        stream.write(b"\x01")
    with pytest.raises(UserError, match="altered after export"):
        bench(copy, engine="onnxruntime", output=tmp_path / "r.json", **QUICK)


def test_a_graph_that_reads_other_files_is_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "onnxruntime" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    stored = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    next(entry for entry in stored.external_data if entry.key == "location").value = "../secret"
    onnx.save(graph, path)
    sealed(copy, read_manifest(copy).exports)
    with pytest.raises(UserError, match=r"reads '\.\./secret'"):
        bench(copy, engine="onnxruntime", output=tmp_path / "r.json", **QUICK)


def test_an_artifact_without_graphs_for_the_engine(tiny_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no graphs for deepsparse \(it has onnxruntime\); add them with"):
        bench(tiny_artifact, output=tmp_path / "r.json", **QUICK)


def test_what_is_no_artifact_and_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no artifact"):
        bench(tmp_path, **QUICK)
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path / "none.json")
    (tmp_path / "new.json").write_text('{"schema": 2, "created": "tomorrow"}')
    with pytest.raises(UserError, match="is a report of schema 2, and this dlp-deploy reads 1"):
        read_report(tmp_path / "new.json")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="is no bench report: schema: Field required"):
        read_report(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match="is no bench report: created"):
        read_report(tmp_path / "bad.json")
    (tmp_path / "s.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UserError, match="holds the points of a sweep"):
        read_report(tmp_path / "s.jsonl")
    (tmp_path / "cut.json").write_text('{"schema": 1')
    with pytest.raises(UserError, match="is no bench report"):
        read_report(tmp_path / "cut.json")
