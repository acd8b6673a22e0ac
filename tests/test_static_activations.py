"""Static int8 activations: the scales hold the text, the graphs are the scheme, and DeepSparse runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlp_deploy import export
from dlp_deploy.artifact import RECIPE, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export.calibrated import CalibratedWeights, quantization_text
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.gptq import rounded
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.inputs import Int8Inputs
from dlp_deploy.export.plan import Graph, plan_graphs
from dlp_deploy.export.quantize import grid_scale, quantize
from dlp_deploy.export.smooth import STATIC_MIGRATION, measure_smoothing, smoothed_checkpoint
from dlp_deploy.export.verify import graph_logits
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model
from dlp_deploy.recipes.recipe import read_recipe
from dlp_deploy.recipes.text import recipe_text

from .artifacts import pruned, with_graphs
from .test_smooth import with_weights
from .tiny_models import torch_model

IDS = np.random.default_rng(0).integers(0, 500, 40)
PROMPT = 24


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1), st.floats(1e-3, 10))
def test_a_static_scale_rounds_to_its_steps_and_cuts_off_what_is_beyond(x: list[float], scale: float) -> None:
    values = torch.tensor(x)
    rounded = Int8Inputs({"layer": scale}).rounded("layer", values)
    within = values.clamp(-128 * scale, 127 * scale)
    assert ((rounded - within).abs() <= scale * 0.5001 + 1e-4).all()
    assert (rounded[values == 0] == 0).all()


@contextmanager
def input_peaks(model: torch.nn.Module) -> Iterator[dict[str, float]]:
    """The largest |x| that enters each linear layer, as transformers runs the model."""
    peaks: dict[str, float] = {}

    def watch(name: str, linear: torch.nn.Module) -> None:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            peaks[name] = max(peaks.get(name, 0.0), float(inputs[0].abs().max()))

        linear.register_forward_pre_hook(see)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    yield peaks


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "opt"])
def test_scales_hold_all_that_the_smoothed_model_reads(
    kind: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    text = quantization_text(files, decoder.max_positions).ids
    smoothing = measure_smoothing(files, checkpoint, text, STATIC_MIGRATION)
    weights = Weights(smoothed_checkpoint(checkpoint, decoder, smoothing), decoder)
    model = with_weights(files.folder, weights)
    with torch.no_grad(), input_peaks(model) as peaks:
        model(text)
    assert set(smoothing.input_scales) == set(peaks)
    for layer, peak in peaks.items():
        assert smoothing.input_scales[layer] * 127 == pytest.approx(peak, rel=1e-4)


def fake_quantized(model: torch.nn.Module, scales: dict[str, float]) -> torch.nn.Module:
    """The int8 scheme written a second time, in torch: weights per channel, inputs per layer."""

    def quantize_inputs(linear: torch.nn.Module, scale: float) -> None:
        linear.register_forward_pre_hook(
            lambda module, inputs: (torch.clamp(torch.round(inputs[0] / scale), -128, 127) * scale,)
        )

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            restored = quantize(module.weight.detach().numpy(), Grid(8)).dequantize()
            module.weight = torch.nn.Parameter(torch.from_numpy(restored))
            quantize_inputs(module, scales[name])
    return model


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0, PROMPT - 1 :].numpy()


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen3", "gemma2", "phi3", "opt"])
def test_a_static_graph_is_the_scheme_it_claims(
    kind: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    config = load_config(files)
    decoder = decoder_of(config)
    model = torch_model(files.folder)
    with input_peaks(model) as peaks:
        exact = torch_logits(model)
    # Too short for the largest entries: they are cut off alike.
    scales = {name: peak / 160 for name, peak in peaks.items()}
    graph = Graph("deepsparse", "int8", False, "deepsparse", activations="static")
    weights = Weights(open_checkpoint(files), decoder)
    written = write_graph(tmp_path, graph, weights, decoder, config, lambda: None, (), scales)
    logits = graph_logits(written.model, IDS, PROMPT)
    expected = torch_logits(fake_quantized(torch_model(files.folder), scales))
    peak = np.abs(exact).max()
    # A sum that differs in its last bit may round an activation to the next step.
    assert np.abs(logits - expected).max() < 2e-2 * peak
    assert np.abs(logits - exact).max() > 1e-3 * peak


@pytest.mark.parametrize("static", [False, True])
def test_gptq_sees_the_inputs_as_the_engine_rounds_them(
    static: bool, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    files = resolve_model(str(tiny_checkpoint("llama")))
    checkpoint, layer, grid = open_checkpoint(files), "model.layers.0.self_attn.q_proj", Grid(4)
    text = quantization_text(files, 128).ids
    model, seen = torch_model(files.folder), []
    linear = model.get_submodule(layer)
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        model(text)
    # Coarse enough to matter.
    scale = float(seen[0].abs().max()) / 4
    inputs = Int8Inputs(dict.fromkeys(decoder_linears(model), scale) if static else None)
    step = scale if static else seen[0].abs().amax(-1, keepdim=True) / 127
    rows = torch.round(seen[0] / step) * step
    weight = linear.weight.detach()
    ((expected, _),) = rounded(
        [weight], rows.T @ rows, [torch.from_numpy(grid_scale(weight.numpy(), grid))], grid
    )
    found = CalibratedWeights(checkpoint, files, text, grid, Grid(8), inputs, tmp_path).quantized(layer, grid)
    assert (torch.from_numpy(found.levels) == expected).float().mean() > 0.999


def decoder_linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def operators(model: Path) -> set[str]:
    return {node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node}


@pytest.mark.parametrize(
    ("kind", "quant", "options"),
    [("llama", "int8", {"rounding": "gptq"}), ("opt", "int4", {"rounding": "nearest", "keep_fp32": "auto"})],
)
def test_exported_for_deepsparse_and_verified_in_it(
    kind: str, quant: str, options: dict[str, str], tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    install("deepsparse")
    artifact = pruned(tiny_checkpoint(kind), tmp_path / "artifact")
    export(artifact, quant, "deepsparse", baseline="none", activations="static", **options)  # type: ignore[arg-type]
    (made,) = read_manifest(artifact).exports
    assert made.activations == "static"
    assert "one scale per layer" in made.notes[0]
    (again,) = (check for check in made.checks if check.reference == "onnxruntime")
    assert again.engine == "deepsparse"
    # A sum that differs in its last bit may round an activation to the next step.
    assert again.mean_rel_error < 5e-3
    assert again.greedy_match > 0.9
    assert "ReduceMax" not in operators(artifact / made.path / "model.onnx")


def test_a_graph_of_the_other_kind_takes_its_place_only_by_force(
    tmp_path: Path, llama_folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    artifact = with_graphs(pruned(llama_folder, tmp_path / "artifact"), "int8", "deepsparse,onnxruntime")
    command = ("export", artifact, "--baseline", "none", "--activations", "static")
    status, _, error = run(*command)
    assert (status, error.count("\n")) == (2, 1)
    assert "add --force" in error
    assert run(*command, "--rounding", "nearest", "--force")[0] == 0
    kinds = {made.engine: made.activations for made in read_manifest(artifact).exports}
    assert kinds == {"deepsparse": "static", "onnxruntime": None}
    assert "activations int8 per tensor" in recipe_text(read_recipe(artifact / RECIPE))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("int8", "onnxruntime", "static"), "--activations static means nothing for --target onnxruntime"),
        (("fp32", "deepsparse", "static"), "--activations static means nothing for .* --quant fp32"),
        (("int8", "deepsparse", "fixed"), "--activations fixed is not known; it takes: dynamic, static"),
    ],
)
def test_where_it_means_nothing_it_is_refused(arguments: tuple[str, str, str], named: str) -> None:
    quant, target, activations = arguments
    with pytest.raises(UserError, match=named):
        plan_graphs(quant, target, "fp32", activations=activations)
