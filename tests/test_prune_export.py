"""What cannot be exported is refused before the model is pruned, from its config alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from dlp_deploy.errors import UserError
from dlp_deploy.export import export
from dlp_deploy.export.exportable import require_exportable
from dlp_deploy.export.onnxruntime import computes_windows
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.models import resolve_model
from dlp_deploy.prune_export import prune_export

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
