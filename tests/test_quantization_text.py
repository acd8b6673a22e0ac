"""The text that graphs are quantized on: the one that was asked for, or that the artifact was pruned on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlp_deploy.artifact import CHECKPOINT, MANIFEST, CalibrationRecord, read_manifest
from dlp_deploy.calibration import builtin_text
from dlp_deploy.errors import UserError
from dlp_deploy.export import export
from dlp_deploy.export.calibrated import quantization_text
from dlp_deploy.export.publish import RECORD
from dlp_deploy.models import resolve_model
from dlp_deploy.prune_export import prune_export
from dlp_deploy.pruning import calibration_record, prune

from .artifacts import pruned

INT4: dict[str, Any] = {"quant": "int4", "target": "onnxruntime", "baseline": "none"}
STATIC: dict[str, Any] = {
    "quant": "int8",
    "target": "deepsparse",
    "baseline": "none",
    "rounding": "nearest",
    "activations": "static",
}
COMMAND = ("--quant", "int4", "--target", "onnxruntime", "--baseline", "none")
PRUNING: dict[str, Any] = {"nsamples": 2, "seqlen": 32}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text that is not the built-in one's calibration part."""
    path = tmp_path / "own.txt"
    path.write_text(builtin_text("evaluation")[:100_000], encoding="utf-8")
    return path


@pytest.fixture
def artifact(llama_folder: Path, text: Path, tmp_path: Path) -> Path:
    """Pruned on a text of its own, without graphs."""
    return prune(str(llama_folder), calib=str(text), output=tmp_path / "artifact", **PRUNING)


def recorded(artifact: Path) -> dict[str, CalibrationRecord | None]:
    return {made.path: made.calibration for made in read_manifest(artifact).exports}


def windows_of(artifact: Path, spec: str) -> CalibrationRecord:
    return calibration_record(quantization_text(resolve_model(str(artifact / CHECKPOINT)), 256, spec))


def weights(artifact: Path, engine: str) -> bytes:
    return (artifact / engine / "model.onnx.data").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_main_job_quantizes_on_the_text_that_it_prunes_on(
    llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    options = {**INT4, "quant": "int4,fp32", "baseline": "fp32,int4", "output": tmp_path / "artifact"}
    artifact = prune_export(str(llama_folder), calib=str(text), **PRUNING, **options)
    expected = windows_of(artifact, str(text))
    assert expected.source == str(text)
    assert (expected.windows, expected.tokens_per_window) == (16, 256)
    assert recorded(artifact) == {
        "onnxruntime": expected,
        "onnxruntime-fp32": None,
        "baseline/fp32": None,
        "baseline/int4": expected,
    }
    # Added later, it is quantized on the same text, and the graph that is there is as asked for.
    export(artifact, **{**INT4, "quant": "int4,int8", "keep_fp32": "none"})
    assert recorded(artifact)["onnxruntime"] == expected


@pytest.mark.parametrize(("engine", "options"), [("onnxruntime", INT4), ("deepsparse", STATIC)])
def test_export_quantizes_on_the_text_of_pruning_unless_told(
    engine: str, options: dict[str, Any], artifact: Path, text: Path
) -> None:
    export(artifact, **options)
    assert recorded(artifact) == {engine: windows_of(artifact, str(text))}
    before = weights(artifact, engine)
    export(artifact, **options, calib="builtin", force=True)
    assert recorded(artifact) == {engine: windows_of(artifact, "builtin")}
    assert weights(artifact, engine) != before
    export(artifact, **options, force=True)
    assert weights(artifact, engine) == before


def test_a_graph_quantized_on_another_text_is_replaced_by_force_alone(
    artifact: Path, text: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    assert run("export", artifact, *COMMAND)[0] == 0
    before = contents(artifact)
    for changed in (["--calib", "builtin"], []):
        if not changed:
            text.write_text(builtin_text("evaluation")[50_000:], encoding="utf-8")
        status, _, error = run("export", artifact, *COMMAND, *changed)
        assert (status, error.count("\n")) == (2, 1)
        assert "onnxruntime exists; add --force" in error
        assert contents(artifact) == before
    assert run("export", artifact, *COMMAND, "--calib", "builtin", "--force")[0] == 0
    assert recorded(artifact)["onnxruntime"] == windows_of(artifact, "builtin")


def test_a_graph_that_does_not_say_its_text_is_not_made_anew(artifact: Path) -> None:
    """As those of releases that did not record it."""
    export(artifact, **INT4)
    record, manifest = artifact / "onnxruntime" / RECORD, artifact / MANIFEST
    stored = json.loads(record.read_text())
    del stored["calibration"]
    record.write_text(json.dumps(stored))
    whole = json.loads(manifest.read_text())
    del whole["exports"][0]["calibration"]
    manifest.write_text(json.dumps(whole))
    before = (artifact / "onnxruntime" / "model.onnx").stat().st_mtime_ns
    export(artifact, **{**INT4, "quant": "int4,fp32"})
    assert recorded(artifact) == {"onnxruntime": None, "onnxruntime-fp32": None}
    assert (artifact / "onnxruntime" / "model.onnx").stat().st_mtime_ns == before


def test_a_text_that_was_moved_is_told_before_anything_is_written(
    artifact: Path, text: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    text.rename(text.with_name("moved.txt"))
    before = contents(artifact)
    status, _, error = run("export", artifact, *COMMAND, "--baseline", "fp32")
    assert (status, error.count("\n")) == (2, 1)
    assert f"text {text} is neither a file nor one of: builtin" in error
    assert "name another one to quantize on with --calib" in error
    assert contents(artifact) == before
    # What reads no text needs none, and another one can be named.
    export(artifact, quant="fp32", target="onnxruntime", baseline="int8")
    export(artifact, **INT4, calib=str(text.with_name("moved.txt")))
    assert recorded(artifact)["onnxruntime-int4"] == windows_of(artifact, str(text.with_name("moved.txt")))


def test_a_text_out_of_reach_is_told_before_pruning_which_does_not_read_it(
    llama_folder: Path, tmp_path: Path
) -> None:
    magnitude = {"method": "magnitude", "allocation": "uniform", "output": tmp_path / "artifact"}
    with pytest.raises(UserError, match=r"text none\.txt is neither a file nor one of"):
        prune_export(str(llama_folder), calib="none.txt", **magnitude, **INT4)
    assert [path.name for path in tmp_path.iterdir()] == [llama_folder.name]


def test_where_pruning_read_no_text_it_is_the_built_in_one_and_then_that_of_the_graphs(
    llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    artifact = pruned(llama_folder, tmp_path / "artifact")
    assert read_manifest(artifact).pruning.calibration is None
    export(artifact, **INT4)
    assert recorded(artifact)["onnxruntime"] == windows_of(artifact, "builtin")
    export(artifact, **INT4, calib=str(text), force=True)
    export(artifact, "int4", target="onnxruntime", baseline="int4")
    assert recorded(artifact)["baseline/int4"] == windows_of(artifact, str(text))


def test_a_text_shorter_than_a_window_is_taken_whole(artifact: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("def main():\n    return [number for number in range(10)]\n" * 3)
    export(artifact, **INT4, calib=str(short))
    record = recorded(artifact)["onnxruntime"]
    assert record == windows_of(artifact, str(short))
    assert record is not None
    assert 2 < record.tokens_per_window < 256
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match="has 0 tokens, less than one window"):
        export(artifact, **INT4, calib=str(empty), force=True)
