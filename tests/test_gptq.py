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
from dlp_deploy.export.gptq import descended, rounded, swept
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.quantize import grid_scale, quantize, scale_of_columns
from dlp_deploy.families import decoder_of
from dlp_deploy.gram import add_products, inverse_factor, mirror, packed, unpack
from dlp_deploy.masking import parse_pattern, prune_sparsegpt
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


def steps_of(scale: torch.Tensor, grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    """The scale of each weight, [out, in]."""
    of_columns = scale_of_columns(scale.numpy(), grid, weight.shape[1])
    return torch.from_numpy(of_columns).expand_as(weight)


def gptq(weight: torch.Tensor, inputs: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels, and the weight that they stand for."""
    begin = torch.from_numpy(grid_scale(weight.numpy(), grid))
    ((levels, scale),) = rounded([weight], inputs.T @ inputs, [begin], grid)
    return levels, levels * steps_of(scale, grid, weight)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), grids)
def test_output_error_is_less_than_that_of_rounding_to_nearest(seed: int, grid: Grid) -> None:
    weight, inputs = layer(seed)
    levels, found = gptq(weight, inputs, grid)
    assert grid.lowest <= int(levels.min()) <= int(levels.max()) <= grid.highest
    assert (levels[weight == 0] == 0).all()
    nearest = torch.from_numpy(quantize(weight.numpy(), grid).dequantize())

    def error(approximation: torch.Tensor) -> float:
        return float((inputs @ (approximation - weight).T).square().sum())

    assert error(found) < error(nearest)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_the_factor_is_that_of_the_inverse_in_any_order(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * size, size, generator=generator)
    gram, order = inputs.T @ inputs, torch.randperm(size, generator=generator)
    expected = factor_by_the_book(gram[order][:, order], 0.01)
    factor = inverse_factor(gram, order)
    assert factor.data_ptr() == gram.data_ptr()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def factor_by_the_book(gram: torch.Tensor, damping: float) -> torch.Tensor:
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 300))
def test_what_cannot_be_inverted_is_damped_more(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    directions = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    # Below zero by more than the first damping makes up for, and less than the second.
    strengths = torch.ones(size, dtype=torch.float64)
    strengths[0] = -0.05
    gram = ((directions * strengths) @ directions.T).float()
    gram = (gram + gram.T) / 2
    expected = factor_by_the_book(gram[order][:, order], 0.1)
    factor = inverse_factor(gram, order)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 1200))
def test_half_of_the_products_make_the_whole_matrix(seed: int, size: int) -> None:
    rows = torch.randn(2, 50, size, generator=torch.Generator().manual_seed(seed))
    gram = torch.zeros(size, size)
    for some in rows:
        add_products(gram, some)
    mirror(gram)
    assert torch.equal(gram, gram.T)
    both = rows.double().flatten(0, 1)
    torch.testing.assert_close(gram.double(), both.T @ both, rtol=1e-4, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300))
def test_a_packed_matrix_comes_back_to_the_bit_in_half_the_memory(seed: int, size: int) -> None:
    rows = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    gram = rows + rows.T
    panels, other = packed(gram), torch.full_like(gram, torch.nan)
    unpack(panels, other)
    assert torch.equal(other, gram)
    assert sum(panel.numel() for panel in panels) <= size * (size + 128) / 2


def test_layers_that_share_inputs_are_rounded_as_each_alone() -> None:
    (one, inputs), (other, _) = layer(3), layer(4, out=40)
    for grid in (Grid(8), Grid(4, 32)):
        begins = [torch.from_numpy(grid_scale(weight.numpy(), grid)) for weight in (one, other)]
        together = rounded([one, other], inputs.T @ inputs, begins, grid)
        for weight, begin, (levels, scale) in zip((one, other), begins, together, strict=True):
            ((alone, its_scale),) = rounded([weight], inputs.T @ inputs, [begin], grid)
            assert torch.equal(levels, alone)
            assert torch.equal(scale, its_scale)


def jointly_rounded(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Levels of one sweep over the dense weight that zeroes and rounds at once, column by column."""
    factor, left = inverse_factor(gram.clone()), weight.clone()
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
    scales = steps_of(torch.from_numpy(grid_scale(pruned.weight.numpy(), grid)), grid, weight)
    levels = swept(pruned.weight, inverse_factor(gram.clone()), scales, grid)
    # Sums in another order: now and then a weight that is half way between two levels goes the other way,
    # and what follows in its row with it.
    assert (levels == jointly_rounded(weight, pruned.keep, gram, scales, grid)).float().mean() > 0.98


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), grids)
def test_descent_from_any_levels_loses_output_error_and_no_zero(seed: int, grid: Grid) -> None:
    weight, inputs = layer(seed)
    gram = inputs.T @ inputs
    begin = quantize(weight.numpy(), grid)
    levels, scale = torch.from_numpy(begin.levels), torch.from_numpy(begin.scale)
    found, refitted = descended(weight, gram, levels, scale, grid)

    def error(levels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Of each output channel."""
        return ((weight - levels * steps_of(scale, grid, weight)) @ inputs.T).square().sum(1)

    assert grid.lowest <= int(found.min()) <= int(found.max()) <= grid.highest
    assert (found[weight == 0] == 0).all()
    assert (refitted * scale > 0).all()
    assert (error(found, refitted) <= error(levels, scale) * (1 + 1e-4)).all()
    assert error(found, refitted).sum() < 0.9 * error(levels, scale).sum()
    # Where it stops, no level that is one step away is better.
    again, _ = descended(weight, gram, found, refitted, grid)
    assert (again == found).float().mean() > 0.9


def test_inputs_that_are_never_seen_are_rounded_to_nearest() -> None:
    weight, inputs = layer(2)
    inputs[:, ::3] = 0
    levels, found = gptq(weight, inputs, Grid(4))
    assert torch.isfinite(found).all()
    scale = found.abs().sum(1) / levels.abs().sum(1)
    nearest = (weight[:, ::3] / scale[:, None]).round().clamp(-7, 7)
    assert (levels[:, ::3] == nearest).float().mean() > 0.95


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight, _ = layer(0)
    levels, _ = gptq(weight, torch.eye(160) * 30, Grid(8))
    assert (levels.numpy() == quantize(weight.numpy(), Grid(8)).levels).all()


def test_a_weight_on_the_grid_stays_as_it_is() -> None:
    weight, inputs = layer(1)
    on_grid = torch.from_numpy(quantize(weight.numpy(), Grid(4)).dequantize())
    _, found = gptq(on_grid, inputs, Grid(4))
    torch.testing.assert_close(found, on_grid)


def logit_error(files: ModelFiles, weights: Weights, ids: torch.Tensor) -> float:
    """Mean error of the logits when the linear layers have these weights, rounded to 4 bits."""
    model = torch_model(files.folder)
    with torch.no_grad():
        expected = model(ids).logits
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                found = torch.from_numpy(weights.quantized(name, Grid(4, 16)).dequantize())
                module.weight = torch.nn.Parameter(found)
        return float((model(ids).logits - expected).abs().mean())


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt"])
def test_a_model_rounded_block_by_block_is_closer_to_itself(
    kind: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    checkpoint, decoder = open_checkpoint(files), decoder_of(load_config(files))
    text = quantization_text(files, decoder.max_positions).ids
    calibrated = CalibratedWeights(checkpoint, files, text, Grid(4, 16), Grid(4, 16), None, tmp_path)
    nearest = logit_error(files, Weights(checkpoint, decoder), text[:4])
    assert logit_error(files, calibrated, text[:4]) < 0.9 * nearest
