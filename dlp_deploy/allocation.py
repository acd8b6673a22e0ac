"""From layer scores to the density (share of weights kept) of each decoder block.

An allocation is one function `(scores, weights, sparsity, alpha) -> densities` on float64 arrays with one
entry per block; `weights` counts the prunable weights of each. Whatever it prefers, the densities'
mean, weighted by `weights`, is 1 - sparsity. A new one is a function and an entry in `ALLOCATIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

Array = NDArray[np.float64]

# Half the range of densities that works best at each sparsity; 0.70: DLP, others: the LSA
# re-implementation of DLP (ICLR 2026).
PUBLISHED_ALPHA = {0.1: 0.06, 0.2: 0.02, 0.3: 0.04, 0.4: 0.02, 0.5: 0.04, 0.6: 0.10, 0.7: 0.15, 0.8: 0.12}
OWL_LAMBDA = 0.08

# The released DLP code never empties a block either: a density of 0 cuts the block out of the model.
LEAST_DENSITY = 0.01


@dataclass(frozen=True)
class Allocation:
    """How scores become densities, the score that it takes by default, and its default `alpha`.

    `statistic` names one of `dlp_deploy.scores.STATISTICS`; None when no scores are needed.
    """

    densities: Callable[[Array, Array, float, float], Array]
    statistic: str | None = "median"
    default_alpha: Callable[[float], float] = lambda sparsity: published_alpha(sparsity)


def published_alpha(sparsity: float) -> float:
    """The published alpha for a sparsity, interpolated between the table's points and held beyond them."""
    return float(np.interp(sparsity, list(PUBLISHED_ALPHA), list(PUBLISHED_ALPHA.values())))


def uniform(scores: Array, weights: Array, sparsity: float, alpha: float) -> Array:
    """The same density everywhere."""
    return np.full(len(weights), 1.0 - sparsity)


def dlp(scores: Array, weights: Array, sparsity: float, alpha: float) -> Array:
    """DLP (arXiv 2505.23807, section 3.3): a block with a large score is less important and pruned more."""
    importance = 1.0 - scores / (scores.sum() or 1.0)
    return balanced(spread(importance, 2 * alpha), weights, sparsity)


def owl(scores: Array, weights: Array, sparsity: float, alpha: float) -> Array:
    """OWL (arXiv 2310.05175, section 3.2): a block with many outliers is pruned less; alpha is lambda."""
    return balanced(spread(scores, 2 * alpha), weights, sparsity)


ALLOCATIONS: dict[str, Allocation] = {
    "dlp": Allocation(dlp),
    "owl": Allocation(owl, "outliers", lambda sparsity: OWL_LAMBDA),
    "uniform": Allocation(uniform, None),
}


def spread(values: Array, width: float) -> Array:
    """Rescale to [0, width]; zeros when all values are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) * width if high > low else np.zeros_like(values)


def balanced(offsets: Array, weights: Array, sparsity: float) -> Array:
    """The densities clip(offsets + shift, least, 1) whose mean, weighted, is exactly 1 - sparsity.

    Where nothing is clipped this is the paper's offsets - mean(offsets) + (1 - sparsity). What clipping
    takes from one block it gives to the others alike, keeping their differences.
    """
    target = 1.0 - sparsity
    least = min(LEAST_DENSITY, target)
    share = weights / weights.sum()

    def clipped(shift: float) -> Array:
        return np.clip(offsets + shift, least, 1.0)

    # The mean is piecewise linear in the shift, with corners where a block reaches a bound.
    corners = np.sort(np.concatenate([least - offsets, 1.0 - offsets]))
    means = np.array([share @ clipped(corner) for corner in corners])
    return clipped(float(np.interp(target, means, corners)))


def densities(
    name: str, scores: Array | None, weights: Array, sparsity: float, alpha: float | None = None
) -> Array:
    """Densities by the allocation `name`; `alpha` None means its default.

    Raises UserError for an unknown name, and for an alpha outside [0, 0.5]: the densities range over
    2 * alpha, which must fit in [0, 1].
    """
    allocation = allocation_named(name)
    alpha = chosen_alpha(name, sparsity, alpha)
    given = np.zeros(len(weights)) if scores is None else scores
    if allocation.statistic is not None and not np.isfinite(given).all():
        raise UserError("a layer score is not finite; the model's weights or activations overflow")
    return allocation.densities(given, weights, sparsity, alpha)


def allocation_named(name: str) -> Allocation:
    if name not in ALLOCATIONS:
        raise UserError(f"unknown allocation {name!r}; there are: {', '.join(sorted(ALLOCATIONS))}")
    return ALLOCATIONS[name]


def chosen_alpha(name: str, sparsity: float, alpha: float | None) -> float:
    """`alpha`, or the default of allocation `name`. Raises UserError outside [0, 0.5]."""
    if alpha is None:
        return allocation_named(name).default_alpha(sparsity)
    if not 0 <= alpha <= 0.5 or math.isnan(alpha):
        raise UserError(
            f"alpha {alpha} cannot be satisfied: densities range over 2 * alpha, so it must lie in [0, 0.5]"
        )
    return alpha


def in_steps(wanted: Array, weights: Array, steps: int) -> Array:
    """Round densities to multiples of 1 / steps, the weighted mean staying as near as that allows.

    For mixed N:M patterns. Blocks are rounded down, and those cut the most get a step back each until
    the mean is met.
    """
    counts = np.floor(wanted * steps + 1e-9)
    missing = float(weights @ (wanted * steps - counts))
    for block in np.argsort(counts - wanted * steps, kind="stable"):
        if missing < weights[block] / 2:
            break
        counts[block] += 1
        missing -= weights[block]
    return counts / steps
