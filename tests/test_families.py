"""Every family the whole way, and what configs say that is not described."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnxruntime import InferenceSession
from transformers import AutoConfig
from transformers.activations import ACT2FN

from dlp_deploy.artifact import CHECKPOINT, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export.activation import ACTIVATIONS, activate
from dlp_deploy.export.add import text_for
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.deepsparse import DeepSparseTarget
from dlp_deploy.export.graph import GraphWriter
from dlp_deploy.export.onnxruntime import OnnxRuntimeTarget, computes_windows
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.export.publish import export_graphs
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import FAMILIES, Decoder, decoder_of
from dlp_deploy.models import load_config, resolve_model
from dlp_deploy.pruning import prune

from .tiny_models import TINY_CONFIGS


# What is peculiar to a family, in the engine whose compiler is the pickiest.
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("qwen3", "int8"), ("gemma2", "fp32"), ("gemma3", "int8"), ("phi4-mini", "fp32"), ("opt", "fp32")],
)
def test_pruned_exported_and_verified_in_the_real_engines(
    kind: str, precision: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    install("deepsparse")
    artifact = prune(
        str(tiny_checkpoint(kind)), calib="builtin", nsamples=4, seqlen=48, output=tmp_path / "pruned"
    )
    windowed = any(described(kind).windows)
    engines = ["deepsparse"] + (["onnxruntime"] if computes_windows() or not windowed else [])
    graphs = plan_graphs(precision, ",".join(engines), "none")
    files = resolve_model(str(artifact / CHECKPOINT))
    exports = export_graphs(artifact, files, None, graphs, text_for(files, graphs, "builtin"))
    assert [export.engine for export in exports] == engines
    compared = {(check.engine, check.reference) for export in exports for check in export.checks}
    assert compared >= {("deepsparse", "torch"), ("onnxruntime", "torch")}
    for export in exports:
        assert export.sparsity - export.rounded_to_zero == pytest.approx(
            read_manifest(artifact).pruning.sparsity
        )


def test_every_family_has_a_tiny_model(tiny_checkpoint: Callable[[str], Path]) -> None:
    found = {decoder_of(AutoConfig.from_pretrained(tiny_checkpoint(kind))).family for kind in TINY_CONFIGS}
    assert found == set(FAMILIES)


def described(kind: str, **settings: Any) -> Decoder:
    config = TINY_CONFIGS[kind]()
    family = next(family for family in FAMILIES if family.name == config.model_type)
    for name, value in {"architectures": family.architectures, **settings}.items():
        setattr(config, name, value)
    return decoder_of(config)


def test_windows_are_those_of_each_block() -> None:
    assert described("gemma2").windows == (20, None, 20)
    assert described("mistral-windowed").windows == (20, 20, 20)
    assert described("mistral-windowed", sliding_window=256).windows == (None, None, None)
    assert described("qwen2", sliding_window=20, use_sliding_window=False).windows == (None, None, None)


def test_positions_end_where_longrope_would_change_its_angles() -> None:
    assert described("phi4-mini").max_positions == 128
    assert described("phi3").max_positions == 256


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False is not supported; opt models"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        ("opt", {"word_embed_proj_dim": 32}, "embeddings of 32 channels projected to 64 are not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
    ],
)
def test_arithmetic_that_is_not_described_is_refused(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        described(kind, **settings)


@pytest.mark.parametrize("engine", ["deepsparse", "onnxruntime"])
def test_unknown_activation_is_refused(
    engine: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    files = resolve_model(str(tiny_checkpoint("llama")))
    config = load_config(files)
    config.hidden_act = "quick_gelu"
    decoder = decoder_of(config)
    weights = Weights(open_checkpoint(files), decoder)
    (graph,) = plan_graphs("fp32", engine, "none")
    with pytest.raises(UserError, match="activation quick_gelu is not supported by the exporter"):
        write_graph(tmp_path, graph, weights, decoder, config, lambda: None)


def test_heads_that_onnxruntime_does_not_take_are_refused() -> None:
    decoder = described("llama", head_dim=20)
    with pytest.raises(UserError, match="heads of a multiple of 8, not 20; leave out --target onnxruntime"):
        OnnxRuntimeTarget(decoder, [None] * decoder.blocks)


def test_heads_that_deepsparse_miscomputes_are_refused() -> None:
    decoder = described("phi3", head_dim=96)
    with pytest.raises(UserError, match=r"heads of 96 channels wrongly .* leave out --target deepsparse"):
        DeepSparseTarget(decoder, [None] * decoder.blocks, detach_output=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_transformers(activation: str, tmp_path: Path) -> None:
    graph = GraphWriter(tmp_path, opset=17, ir_version=9)
    x = graph.input("x", TensorProto.FLOAT, ("n",))
    graph.output(activate(graph, x, activation), TensorProto.FLOAT, ("n",))
    session = InferenceSession(graph.close(activation), providers=["CPUExecutionProvider"])
    values = np.linspace(-8, 8, 1001, dtype=np.float32)
    expected = ACT2FN[activation](torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(session.run(None, {"x": values})[0], expected, atol=2e-6)
