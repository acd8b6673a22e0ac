"""A small artifact that went the whole way: really pruned, exported, verified, with dense baselines."""

from __future__ import annotations

from pathlib import Path

from dlp_deploy.artifact import CHECKPOINT
from dlp_deploy.export.add import text_for
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.export.publish import export_graphs
from dlp_deploy.models import resolve_model

from .artifacts import pruned, sealed


def exported_artifact(
    checkpoint: Path,
    output: Path,
    quant: str = "fp32,int8",
    target: str = "deepsparse,onnxruntime",
    baseline: str = "fp32,int8",
) -> Path:
    artifact = pruned(checkpoint, output)
    graphs = plan_graphs(quant, target, baseline)
    files = resolve_model(str(artifact / CHECKPOINT))
    text = text_for(files, graphs, "builtin")
    sealed(artifact, export_graphs(artifact, files, resolve_model(str(checkpoint)), graphs, text))
    return artifact
