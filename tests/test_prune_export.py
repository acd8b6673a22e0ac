"""The main job: what cannot be exported is refused before pruning, and what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import LlamaConfig

from dlp_deploy.artifact import MANIFEST, check_files, read_manifest
from dlp_deploy.errors import UserError
from dlp_deploy.export import export, publish
from dlp_deploy.export.exportable import require_exportable
from dlp_deploy.export.onnxruntime import computes_windows
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.models import resolve_model
from dlp_deploy.prune_export import prune_export
from dlp_deploy.pruning import prune
from dlp_deploy.unfinished import LOCK

from .artifacts import pruned
from .tiny_models import SIZES, save_tiny_model

SMALL = {"calib": "builtin", "nsamples": 1, "seqlen": 16, "method": "magnitude", "allocation": "uniform"}


def odd_heads(folder: Path, head_dim: int, tokenizer: Any) -> Path:
    return save_tiny_model(folder, LlamaConfig(**SIZES, head_dim=head_dim), tokenizer)


def test_heads_that_an_engine_computes_wrongly(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = odd_heads(tmp_path / "model", 80, tiny_tokenizer)
    artifact = pruned(model, tmp_path / "artifact")
    with pytest.raises(UserError, match="DeepSparse computes heads of 80 channels wrongly"):
        prune_export(str(model), output=tmp_path / "output", **SMALL)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="DeepSparse computes heads of 80 channels wrongly"):
        export(artifact, quant="int8")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "artifact"}
    require_exportable(resolve_model(str(model)), plan_graphs("int8", "onnxruntime", "fp32"))


def test_heads_that_onnx_runtime_does_not_take(tmp_path: Path, tiny_tokenizer: Any) -> None:
    model = odd_heads(tmp_path / "model", 20, tiny_tokenizer)
    with pytest.raises(UserError, match="heads of a multiple of 8, not 20"):
        prune_export(str(model), target="deepsparse", output=tmp_path / "output", **SMALL)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_pattern_that_matches_no_layer(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = str(tiny_checkpoint("llama"))
    with pytest.raises(UserError, match=r"--keep-fp32 model\.layer\.0.* matches no linear layer"):
        prune_export(model, keep_fp32="lm_head,model.layer.0.*", output=tmp_path / "output", **SMALL)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "said"), [("opt", "opt models are not written"), ("mistral-windowed", "sliding windows")]
)
def test_what_llamacpp_does_not_know(kind: str, said: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    with pytest.raises(UserError, match=said):
        require_exportable(files, plan_graphs("int8", "none", "llamacpp-int8"))
    if kind == "opt" or computes_windows():
        require_exportable(files, plan_graphs("int8", "onnxruntime", "fp32"))


def test_interrupted_between_two_graphs_it_goes_on_with_the_second(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = str(tiny_checkpoint("llama")), tmp_path / "output"
    options: Any = {
        **SMALL,
        "output": output,
        "quant": "fp32,int8",
        "target": "onnxruntime",
        "baseline": "none",
    }
    checked: list[Any] = []
    check = publish.engine_logits

    def interrupted(*arguments: Any) -> Any:
        checked.append(arguments)
        if len(checked) == 2:
            raise KeyboardInterrupt
        return check(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(publish, "engine_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_export(model, **options)
    (unfinished,) = tmp_path.iterdir()
    assert [made.path for made in read_manifest(unfinished).exports] == ["onnxruntime"]
    assert not list(unfinished.glob("onnxruntime-int8*"))
    written = (unfinished / "onnxruntime" / "model.onnx").stat().st_mtime_ns
    assert prune_export(model, **options, resume=True) == output
    assert (output / "onnxruntime" / "model.onnx").stat().st_mtime_ns == written
    manifest = read_manifest(output)
    assert [made.path for made in manifest.exports] == ["onnxruntime", "onnxruntime-int8"]
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert there == {stored.path for stored in manifest.files} | {MANIFEST}
    check_files(output, manifest)


def test_an_artifact_that_is_exported_to_is_not_replaced(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = pruned(tiny_checkpoint("llama"), tmp_path / "artifact")
    with FileLock(artifact / LOCK), pytest.raises(UserError, match=f"another run is writing to {artifact}"):
        prune(str(tiny_checkpoint("llama")), output=artifact, force=True, **SMALL)  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}
    check_files(artifact, read_manifest(artifact))
