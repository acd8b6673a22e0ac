from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dlp_deploy.allocation import (
    ALLOCATIONS,
    PUBLISHED_ALPHA,
    Allocation,
    balanced,
    densities,
    in_steps,
    published_alpha,
)
from dlp_deploy.errors import UserError

BLOCKS = st.shared(st.integers(1, 40), key="blocks")
SCORES = arrays(np.float64, BLOCKS, elements=st.floats(1e-6, 1e3))
WEIGHTS = arrays(np.float64, BLOCKS, elements=st.integers(1, 10**9).map(float))
SPARSITIES = st.floats(0, 0.999)
ALPHAS = st.floats(0, 0.5)


def paper_densities(scores: np.ndarray, sparsity: float, alpha: float) -> np.ndarray:
    """The formula of the DLP paper as its released code writes it, for blocks of equal size."""
    layer_scores = torch.tensor(scores)
    importance = 1 - layer_scores / layer_scores.sum()
    scaled = (importance - importance.min()) * (1 / (importance.max() - importance.min()) * alpha * 2)
    return (scaled - scaled.mean() + (1 - sparsity)).numpy()


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
@given(SCORES, WEIGHTS, SPARSITIES, ALPHAS)
def test_overall_sparsity_is_exact_whatever_is_clipped(
    name: str, scores: Any, weights: Any, sparsity: float, alpha: float
) -> None:
    found = densities(name, scores, weights, sparsity, alpha)
    assert np.average(found, weights=weights) == pytest.approx(1 - sparsity, abs=1e-12)
    assert ((found > 0) & (found <= 1)).all()
    assert np.ptp(found) <= 2 * alpha + 1e-12


@given(SCORES, SPARSITIES, ALPHAS)
def test_dlp_is_the_papers_formula_where_nothing_is_clipped(
    scores: Any, sparsity: float, alpha: float
) -> None:
    assume(np.ptp(scores / scores.sum()) > 1e-9)
    expected = paper_densities(scores, sparsity, alpha)
    assume(expected.min() >= 0.01)
    assume(expected.max() <= 1)
    found = densities("dlp", scores, np.full(len(scores), 7.0), sparsity, alpha)
    np.testing.assert_allclose(found, expected, atol=1e-9)


@given(SCORES, WEIGHTS, SPARSITIES, ALPHAS)
def test_dlp_never_keeps_more_of_a_block_with_a_larger_score(
    scores: Any, weights: Any, sparsity: float, alpha: float
) -> None:
    found = densities("dlp", scores, weights, sparsity, alpha)
    assert (np.diff(found[np.argsort(scores)]) <= 1e-12).all()


@given(SCORES, WEIGHTS, SPARSITIES, ALPHAS)
def test_owl_never_keeps_less_of_a_block_with_more_outliers(
    scores: Any, weights: Any, sparsity: float, alpha: float
) -> None:
    found = densities("owl", scores, weights, sparsity, alpha)
    assert (np.diff(found[np.argsort(scores)]) >= -1e-12).all()


def test_clipped_blocks_keep_the_differences_of_the_others() -> None:
    offsets = np.array([0.0, 0.3, 0.5, 0.9])
    found = balanced(offsets, np.ones(4), 0.9)
    assert found.mean() == pytest.approx(0.1)
    assert found[:3].tolist() == [0.01, 0.01, 0.01]


@pytest.mark.parametrize(("sparsity", "alpha"), PUBLISHED_ALPHA.items())
def test_alpha_defaults_to_the_published_table(sparsity: float, alpha: float) -> None:
    scores = np.array([1.0, 2.0, 4.0])
    assert published_alpha(sparsity) == pytest.approx(alpha)
    by_default = densities("dlp", scores, np.ones(3), sparsity)
    assert by_default.tolist() == densities("dlp", scores, np.ones(3), sparsity, alpha).tolist()


def test_alpha_is_interpolated_between_and_held_beyond_the_table() -> None:
    assert published_alpha(0.65) == pytest.approx(0.125)
    assert published_alpha(0.95) == pytest.approx(0.12)
    assert published_alpha(0.0) == pytest.approx(0.06)


@pytest.mark.parametrize("alpha", [-0.01, 0.51, float("nan"), float("inf")])
def test_alpha_that_nothing_can_satisfy(alpha: float) -> None:
    with pytest.raises(UserError, match=r"cannot be satisfied.*must lie in \[0, 0\.5\]"):
        densities("dlp", np.ones(3), np.ones(3), 0.7, alpha)


def test_unknown_allocation() -> None:
    with pytest.raises(UserError, match="unknown allocation 'best'; there are: dlp, owl, uniform"):
        densities("best", np.ones(3), np.ones(3), 0.7)


def test_scores_that_overflowed() -> None:
    with pytest.raises(UserError, match="layer score is not finite"):
        densities("dlp", np.array([1.0, np.inf]), np.ones(2), 0.7)


def test_a_new_allocation_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_blocks_first(scores: Any, weights: Any, sparsity: float, alpha: float) -> Any:
        return balanced(np.linspace(2 * alpha, 0, len(weights)), weights, sparsity)

    monkeypatch.setitem(ALLOCATIONS, "last-first", Allocation(last_blocks_first))
    found = densities("last-first", np.ones(3), np.ones(3), 0.5, 0.1)
    np.testing.assert_allclose(found, [0.6, 0.5, 0.4])


@given(SCORES, WEIGHTS, st.sampled_from([4, 8]), st.floats(0.05, 0.95))
def test_steps_stay_near_the_wanted_densities(scores: Any, weights: Any, steps: int, sparsity: float) -> None:
    wanted = densities("dlp", scores, weights, sparsity, 0.1)
    found = in_steps(wanted, weights, steps)
    np.testing.assert_allclose(found * steps, np.round(found * steps))
    assert (np.abs(found - wanted) <= 1 / steps + 1e-9).all()
    error = abs(np.average(found, weights=weights) - (1 - sparsity))
    assert error <= weights.max() / weights.sum() / steps + 1e-9
