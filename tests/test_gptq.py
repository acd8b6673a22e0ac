"""Rounding that makes up for its errors: on the grid, under the mask, and closer in what a layer puts out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.export.calibrated import CalibratedWeights, quantization_text
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.gptq import rounded_levels
from dlp_deploy.export.quantize import Grid, grid_scale, quantize, scale_of_columns
from dlp_deploy.families import decoder_of
from dlp_deploy.masking import inverse_factor, parse_pattern, prune_sparsegpt
from dlp_deploy.models import ModelFiles, load_config, resolve_model

from .tiny_models import torch_model

grids = st.builds(Grid, st.sampled_from([4, 8]), st.sampled_from([None, 32]))


def layer(seed: int, out: int = 24, inputs: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with 60 % zeros, and correlated inputs [tokens, in]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    weight[torch.rand(out, inputs, generator=generator) < 0.6] = 0
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 * 2
    return weight, torch.randn(600, inputs, generator=generator) @ (mixing + torch.eye(inputs))


def gptq(weight: torch.Tensor, inputs: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, and the weight that they stand for."""
    scale = torch.from_numpy(scale_of_columns(grid_scale(weight.numpy(), grid), grid, weight.shape[1]))
    levels = rounded_levels(weight, inputs.T @ inputs, scale, grid.lowest, grid.highest)
    return levels, levels * scale


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), grids)
def test_output_error_is_less_than_that_of_rounding_to_nearest(seed: int, grid: Grid) -> None:
    weight, inputs = layer(seed)
    levels, rounded = gptq(weight, inputs, grid)
    assert grid.lowest <= int(levels.min()) <= int(levels.max()) <= grid.highest
    assert (levels[weight == 0] == 0).all()
    nearest = torch.from_numpy(quantize(weight.numpy(), grid).dequantize())

    def error(approximation: torch.Tensor) -> float:
        return float((inputs @ (approximation - weight).T).square().sum())

    assert error(rounded) < error(nearest)


def jointly_rounded(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Levels of one sweep over the dense weight that zeroes and rounds at once, column by column."""
    factor, left = inverse_factor(gram), weight.clone()
    levels = torch.empty(weight.shape)
    for j in range(weight.shape[1]):
        level = (left[:, j] / scale[:, j]).round().clamp(grid.lowest, grid.highest) * keep[:, j]
        error = (left[:, j] - level * scale[:, j]) / factor[j, j]
        left[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
        levels[:, j] = level
    return levels


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), grids)
def test_behind_sparsegpt_it_is_the_joint_sweep(seed: int, grid: Grid) -> None:
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(seed))
    _, inputs = layer(seed)
    gram = inputs.T @ inputs
    pruned = prune_sparsegpt(weight, gram, 0.6, parse_pattern("unstructured"))
    assert pruned.weight is not None
    scale = scale_of_columns(grid_scale(pruned.weight.numpy(), grid), grid, 160)
    scales = torch.from_numpy(scale).expand_as(weight)
    levels = rounded_levels(pruned.weight, gram, scales, grid.lowest, grid.highest)
    # Sums in another order: now and then a weight that is half way between two levels goes the other way,
    # and what follows in its row with it.
    assert (levels == jointly_rounded(weight, pruned.keep, gram, scales, grid)).float().mean() > 0.98


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = layer(0)
    levels, _ = gptq(weight, torch.eye(160) * 30, Grid(8))
    assert (levels.numpy() == quantize(weight.numpy(), Grid(8)).levels).all()


def test_a_weight_on_the_grid_stays_as_it_is() -> None:
    weight, inputs = layer(1)
    on_grid = torch.from_numpy(quantize(weight.numpy(), Grid(4)).dequantize())
    _, rounded = gptq(on_grid, inputs, Grid(4))
    torch.testing.assert_close(rounded, on_grid)


def logit_error(files: ModelFiles, weights: Weights, ids: torch.Tensor) -> float:
    """Mean error of the logits when the linear layers have these weights, rounded to 4 bits."""
    model = torch_model(files.folder)
    with torch.no_grad():
        expected = model(ids).logits
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                rounded = torch.from_numpy(weights.quantized(name, Grid(4, 16)).dequantize())
                module.weight = torch.nn.Parameter(rounded)
        return float((model(ids).logits - expected).abs().mean())


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
def test_a_model_rounded_block_by_block_is_closer_to_itself(
    kind: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    text = quantization_text(files, decoder.max_positions)
    calibrated = CalibratedWeights(checkpoint, files, text, Grid(4, 16), Grid(4, 16), None, tmp_path)
    nearest = logit_error(files, Weights(checkpoint, decoder), text[:4])
    assert logit_error(files, calibrated, text[:4]) < 0.9 * nearest
