from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dlp_deploy.errors import UserError
from dlp_deploy.masking import (
    METHODS,
    Pattern,
    magnitude_keep,
    method_named,
    parse_pattern,
    prune_sparsegpt,
    structured_keep,
    wanda_keep,
)

ANYWHERE = parse_pattern("unstructured")
MATRICES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=24),
    elements=st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-4, 4, width=32),
).map(torch.from_numpy)
SPARSITIES = st.floats(0, 0.999)


def correlated_inputs(features: int, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, features] whose features depend on each other, as real activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(4 * features, features, generator=generator) @ (mixing + 0.5 * torch.eye(features))


@given(MATRICES, SPARSITIES)
def test_magnitude_keeps_exactly_so_many_and_none_smaller_than_a_dropped_one(
    weight: torch.Tensor, sparsity: float
) -> None:
    keep = magnitude_keep(weight, sparsity)
    assert int(keep.sum()) == int(weight.numel() * (1 - sparsity) + 0.5)
    if keep.any() and not keep.all():
        assert weight.abs()[keep].min() >= weight.abs()[~keep].max()


@given(MATRICES, SPARSITIES, st.data())
def test_wanda_compares_within_a_row_and_is_exact_over_the_matrix(
    weight: torch.Tensor, sparsity: float, data: Any
) -> None:
    columns = weight.shape[1]
    norms = torch.tensor(data.draw(st.lists(st.floats(0, 9, width=32), min_size=columns, max_size=columns)))
    keep = wanda_keep(weight, norms, sparsity)
    assert int(keep.sum()) == int(weight.numel() * (1 - sparsity) + 0.5)
    counts = keep.sum(1)
    assert int(counts.max() - counts.min()) <= 1
    metric = weight.abs() * norms
    for row, kept in zip(metric, keep, strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max()


def test_wanda_on_odd_sizes_larger_than_a_slice() -> None:
    torch.manual_seed(0)
    weight, norms = torch.randn(131, 97), torch.rand(97)
    keep = wanda_keep(weight, norms, 0.7)
    metric = weight.abs() * norms
    for row in range(131):
        count = int(keep[row].sum())
        assert set(keep[row].nonzero()[:, 0].tolist()) == set(metric[row].topk(count).indices.tolist())


@pytest.mark.parametrize(("pruned", "group"), [(2, 4), (4, 8), (1, 4), (7, 8)])
def test_every_group_loses_its_smallest(pruned: int, group: int) -> None:
    torch.manual_seed(0)
    metric = torch.rand(13, 6 * group)
    groups = structured_keep(metric, pruned, group).reshape(-1, group)
    assert (groups.sum(1) == group - pruned).all()
    values = metric.reshape(-1, group)
    for kept, row in zip(groups, values, strict=True):
        assert row[kept].min() > row[~kept].max()


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "N:8"])
def test_patterns_hold_in_every_method(method: str, pattern: str) -> None:
    torch.manual_seed(0)
    inputs = correlated_inputs(136)
    weight = torch.randn(10, 136)
    known = {"nothing": None, "norms": inputs.norm(dim=0), "gram": inputs.T @ inputs}[METHODS[method].inputs]
    pruned = METHODS[method].prune(weight, known, 0.625 if pattern == "N:8" else 0.5, parse_pattern(pattern))
    group = int(pattern[2:])
    kept = {"2:4": 2, "4:8": 4, "N:8": 3}[pattern]
    assert (pruned.keep.reshape(-1, group).sum(1) == kept).all()
    assert pruned.weight is None or torch.equal(pruned.weight == 0, ~pruned.keep)


def obs_reference(weight: np.ndarray, gram: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Prune column after column by Optimal Brain Surgeon, inverting what is left of the Hessian each time.

    SparseGPT, equation 3 and section 3.2, in float64 and without its Cholesky shortcut.
    """
    weight = weight.astype(np.float64).copy()
    hessian = gram.astype(np.float64) + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        error = np.where(keep[:, column], 0, weight[:, column]) / inverse[0, 0]
        weight[:, column:] -= np.outer(error, inverse[0])
        weight[~keep[:, column], column] = 0
    return weight


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_updates_are_those_of_optimal_brain_surgeon(pattern: str) -> None:
    torch.manual_seed(0)
    inputs = correlated_inputs(136)
    weight, gram = torch.randn(12, 136), inputs.T @ inputs
    pruned = prune_sparsegpt(weight, gram, 0.5, parse_pattern(pattern))
    assert pruned.weight is not None
    expected = obs_reference(weight.numpy(), gram.numpy(), pruned.keep.numpy())
    np.testing.assert_allclose(pruned.weight.numpy(), expected, atol=2e-3)


def test_sparsegpt_chooses_by_weight_over_inverse_hessian_within_the_first_slab() -> None:
    torch.manual_seed(0)
    inputs = correlated_inputs(128)
    weight, gram = torch.randn(12, 128), inputs.T @ inputs
    keep = prune_sparsegpt(weight, gram, 0.7, ANYWHERE).keep
    hessian = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(128)
    left = torch.stack([torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(128)])
    saliency = weight.double().square() / left
    assert saliency[keep].min() > saliency[~keep].max()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.93])
def test_sparsegpt_reconstructs_better_than_its_own_mask_alone(sparsity: float) -> None:
    torch.manual_seed(0)
    inputs = correlated_inputs(150)
    weight = torch.randn(20, 150)
    pruned = prune_sparsegpt(weight, inputs.T @ inputs, sparsity, ANYWHERE)
    assert pruned.weight is not None
    assert int(pruned.keep.sum()) == round(weight.numel() * (1 - sparsity))
    masked = weight.masked_fill(~pruned.keep, 0)
    error, without_update = ((inputs @ (w - weight).T).square().sum() for w in (pruned.weight, masked))
    assert error <= without_update
    if sparsity > 0:
        assert error < 0.95 * without_update


def test_sparsegpt_with_dead_inputs() -> None:
    torch.manual_seed(0)
    inputs = correlated_inputs(40)
    inputs[:, 7] = 0
    pruned = prune_sparsegpt(torch.randn(6, 40), inputs.T @ inputs, 0.5, ANYWHERE)
    assert pruned.weight is not None
    assert torch.isfinite(pruned.weight).all()
    assert (pruned.weight[:, 7] == 0).all()


def test_sparsegpt_leaves_its_arguments_alone() -> None:
    inputs = correlated_inputs(16)
    weight, gram = torch.randn(4, 16), inputs.T @ inputs
    before = weight.clone(), gram.clone()
    prune_sparsegpt(weight, gram, 0.5, ANYWHERE)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@pytest.mark.parametrize("text", ["2:3", "4:4", "0:4", "8:4", "2:256", "x", "2-4", "N:", "n:8"])
def test_impossible_patterns(text: str) -> None:
    with pytest.raises(UserError, match="pattern"):
        parse_pattern(text)


def test_mixed_pattern_follows_the_blocks_sparsity() -> None:
    mixed, fixed = parse_pattern("N:8"), Pattern("2:4", 2, 4)
    assert (mixed.for_sparsity(0.75), fixed.for_sparsity(0.75)) == ((6, 8), (2, 4))
    assert ANYWHERE.for_sparsity(0.75) is None


def test_unknown_method() -> None:
    with pytest.raises(UserError, match="unknown method 'random'; there are: magnitude, wanda, sparsegpt"):
        method_named("random")
