"""The check behind every export: what it lets through, what it does not, and that nothing is left of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dlp_deploy import export
from dlp_deploy.artifact import OutputCheck, read_manifest
from dlp_deploy.export import publish
from dlp_deploy.export.graph import DATA_FILE
from dlp_deploy.export.verify import VerificationError, compare_logits, require_agreement
from dlp_deploy.export.write import Written, write_graph

from .artifacts import pruned

LOGITS = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)
PEAK = float(np.abs(LOGITS).max())


def require(precision: str, **logits: np.ndarray) -> list[OutputCheck]:
    """What was checked, if it is let through."""
    checks = [compare_logits(engine, "torch", found, LOGITS) for engine, found in logits.items()]
    require_agreement(checks, precision, Path("model.onnx"))
    return checks


@pytest.mark.parametrize(("precision", "noise"), [("fp32", 1e-6), ("int8", 0.01), ("int4", 0.06)])
def test_what_a_precision_explains_is_let_through(precision: str, noise: float) -> None:
    moved = noise * PEAK * NOISE
    checks = require(precision, onnxruntime=LOGITS + moved, deepsparse=LOGITS - moved)
    assert [check.engine for check in checks] == ["onnxruntime", "deepsparse"]
    for check in checks:
        assert check.mean_rel_error == pytest.approx(noise * np.abs(NOISE).mean(), rel=0.05)
        assert check.max_rel_error == pytest.approx(noise * np.abs(NOISE).max(), rel=0.05)
        assert check.positions == len(LOGITS)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("wrong", [0 * LOGITS, -LOGITS, LOGITS[:, ::-1], np.full_like(LOGITS, np.nan)])
def test_logits_of_something_else_are_not(precision: str, wrong: np.ndarray) -> None:
    with pytest.raises(VerificationError, match="error of its logits in deepsparse"):
        require(precision, onnxruntime=LOGITS, deepsparse=wrong)


def test_an_engine_is_held_to_what_onnxruntime_makes_of_the_same_graph() -> None:
    """Twice its error is a wrong kernel, also where the precision alone would explain it."""
    close, far = LOGITS + 0.01 * PEAK * NOISE, LOGITS - 0.02 * PEAK * NOISE
    with pytest.raises(VerificationError, match="deepsparse"):
        require("int8", onnxruntime=close, deepsparse=far)
    ours, theirs = require("int8", onnxruntime=far, deepsparse=close)
    assert ours.mean_rel_error == pytest.approx(2 * theirs.mean_rel_error, rel=0.01)


def spoil(model: Path) -> None:
    """Give the head's channels each other's scales or, in fp32, turn the signs of its weights."""
    tensors = {t.name: t for t in onnx.load(str(model), load_external_data=False).graph.initializer}
    tensor = tensors.get("lm_head.scale") or tensors["lm_head.weight"]
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    data = np.memmap(model.with_name(DATA_FILE), np.float32, "r+", offset, (length // 4,))
    data[:] = data[::-1].copy() if tensor.name.endswith("scale") else -data
    data.flush()


@pytest.mark.parametrize("options", [{"quant": "fp32"}, {"quant": "int4", "block_size": 16}])
def test_a_graph_that_computes_something_else_is_not_published(
    options: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = pruned(llama_folder, tmp_path / "artifact")
    before = read_manifest(artifact)

    def spoiled(*arguments: Any) -> Written:
        written = write_graph(*arguments)
        spoil(written.model)
        return written

    monkeypatch.setattr(publish, "write_graph", spoiled)
    with pytest.raises(VerificationError, match="onnxruntime"):
        export(artifact, target="onnxruntime", baseline="none", **options)
    assert read_manifest(artifact) == before
    assert not list(artifact.glob("onnxruntime*"))


@pytest.mark.parametrize(("opset", "ir_version"), [(17, 7), (13, 9)])
def test_a_graph_in_a_format_that_its_engine_does_not_read_is_not_published(
    opset: int, ir_version: int, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = pruned(llama_folder, tmp_path / "artifact")

    def newer(*arguments: Any) -> Written:
        written = write_graph(*arguments)
        graph = onnx.load(str(written.model), load_external_data=False)
        graph.opset_import[0].version, graph.ir_version = opset, ir_version
        onnx.save(graph, str(written.model))
        return written

    monkeypatch.setattr(publish, "write_graph", newer)
    with pytest.raises(VerificationError, match=f"IR version {ir_version}; DeepSparse reads up to 13"):
        export(artifact, quant="fp32", target="deepsparse", baseline="none")
    assert not list(artifact.glob("deepsparse*"))
