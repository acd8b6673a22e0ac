"""Smoothing changes nothing but what is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

from dlp_deploy.artifact import CHECKPOINT, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export import export
from dlp_deploy.export.calibrated import quantization_text
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.export.quantize import quantize
from dlp_deploy.export.smooth import measure_smoothing, smoothed_checkpoint
from dlp_deploy.families import Decoder, decoder_of
from dlp_deploy.models import ModelFiles, load_config, resolve_model

from .artifacts import pruned
from .tiny_models import TINY_CONFIGS, torch_model

IDS = torch.arange(40)[None] * 11 % 500


def with_weights(folder: Path, weights: Weights) -> torch.nn.Module:
    """The model of `folder`, run by transformers, with the tensors that `weights` says."""
    model = torch_model(folder)
    offset = decoder_of(model.config).family.norm_offset
    # A head of its own: the exporter writes one, tied or not.
    model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(weights.linear("lm_head")))
    with torch.no_grad():
        for name, module in model.model.named_modules(prefix="model"):
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.from_numpy(weights.linear(name)))
                if module.bias is not None:
                    module.bias.copy_(torch.from_numpy(weights.bias(name)))
            elif name.endswith("norm"):
                module.weight.copy_(torch.from_numpy(weights.norm(name) - offset))
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(torch.from_numpy(weights.norm_bias(name)))
    return model


def smoothed_weights(files: ModelFiles) -> Weights:
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    text = quantization_text(files, decoder.max_positions).ids
    smoothing = measure_smoothing(files, checkpoint, text)
    return Weights(smoothed_checkpoint(checkpoint, decoder, smoothing), decoder)


@torch.no_grad()
def logits(model: torch.nn.Module) -> np.ndarray:
    return model(IDS).logits[0].numpy()


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_the_smoothed_model_is_the_same_function(kind: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    smoothed = smoothed_weights(files)
    last = f"{decoder.family.block(1)}.{decoder.family.linears[-1]}"
    assert not np.allclose(smoothed.linear(last), Weights(checkpoint, decoder).linear(last), rtol=0.01)
    expected = logits(torch_model(files.folder))
    np.testing.assert_allclose(logits(with_weights(files.folder, smoothed)), expected, atol=2e-4, rtol=1e-4)


def int8_error(folder: Path, weights: Weights, expected: np.ndarray) -> float:
    """Mean logit error with weights int8 per channel and activations int8 per token."""
    model = with_weights(folder, weights)

    def quantize_input(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (torch.round(inputs[0] / scale) * scale,)

    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            restored = quantize(weights.linear(name), Grid(8)).dequantize()
            module.weight = torch.nn.Parameter(torch.from_numpy(restored))
            module.register_forward_pre_hook(quantize_input)
    return float(np.abs(logits(model) - expected).mean())


def test_outlier_channels_cost_less_when_smoothed(llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 60
            layer.post_attention_layernorm.weight[5] *= 60
    model.save_pretrained(llama_folder)
    files = resolve_model(str(llama_folder))
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    expected = logits(AutoModelForCausalLM.from_pretrained(llama_folder))
    plain = int8_error(llama_folder, Weights(checkpoint, decoder), expected)
    eased = int8_error(llama_folder, smoothed_weights(files), expected)
    assert eased < 0.8 * plain


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_smoothing_can_be_left_out(
    activations: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    install("deepsparse")
    artifact = pruned(tiny_checkpoint("llama-tied"), tmp_path / "artifact")
    options: dict[str, Any] = {"target": "deepsparse", "baseline": "none", "rounding": "nearest"}
    options["activations"] = activations
    export(artifact, "int8", smooth=False, **options)
    (rough,) = read_manifest(artifact).exports
    assert rough.smoothed is False
    assert rough.notes[0].startswith("weights: 8 bit")
    # Nothing else of it is measured on text.
    assert (rough.calibration is None) == (activations == "dynamic")
    with pytest.raises(UserError, match="add --force"):
        export(artifact, "int8", **options)
    stored = {layer: int8_weights(artifact, layer) for layer in ("lm_head", "model.layers.1.mlp.down_proj")}
    for layer, levels in stored.items():
        weight = Weights(open_checkpoint(resolve_model(str(artifact / CHECKPOINT))), described(artifact))
        expected = quantize(weight.linear(layer), Grid(8)).levels
        np.testing.assert_array_equal(levels, expected)
    export(artifact, "int8", force=True, **options)
    (smooth,) = read_manifest(artifact).exports
    assert smooth.smoothed is True
    assert smooth.notes[0].startswith("smoothed; weights: 8 bit")
    assert (int8_weights(artifact, "lm_head") != stored["lm_head"]).any()


def described(artifact: Path) -> Decoder:
    return decoder_of(load_config(resolve_model(str(artifact / CHECKPOINT))))


def int8_weights(artifact: Path, layer: str) -> np.ndarray:
    """Levels int8 [out, in] of a layer of the DeepSparse graph."""
    graph = onnx.load(str(artifact / "deepsparse" / "model.onnx")).graph
    (tensor,) = (entry for entry in graph.initializer if entry.name == f"{layer}.weight")
    return numpy_helper.to_array(tensor).T


def test_leaving_it_out_where_there_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="--no-smooth means nothing for --target onnxruntime"):
        plan_graphs("int8", "onnxruntime", "none", smooth=False)
