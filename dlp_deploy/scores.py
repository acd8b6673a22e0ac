"""Layer scores: one number for a decoder block from the Wanda metric of all its weights.

The metric of weight (i, j) is |W_ij| * ||X_j||_2, with X_j the j-th input feature over all calibration
tokens (Wanda, arXiv 2306.11695, equation 1). DLP takes its median over a block's linear layers taken
together (arXiv 2505.23807, section 3.2); the others are the alternatives of its ablation, and OWL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from .errors import UserError
from .selection import Floats, Numbers, kth_smallest

# Small enough for the second-level cache, large enough for threads not to wait for the interpreter.
CHUNK = 1 << 17
OWL_OUTLIER = 5.0


def wanda_metric(weights: Mapping[str, torch.Tensor], norms: Mapping[str, torch.Tensor]) -> Numbers:
    """The metric of all weights of a block.

    `weights` are matrices [out, in] by module, `norms` the float32 input norms [in] of the same modules.
    """

    def of_rows(rows: torch.Tensor, norm: Floats) -> Floats:
        metric = np.abs(rows.cpu().numpy())
        metric *= norm
        return metric.reshape(-1)

    pieces = [
        partial(of_rows, rows, norms[module].cpu().numpy())
        for module, weight in weights.items()
        for rows in weight.split(max(1, CHUNK // weight.shape[1]))
    ]
    return Numbers(sum(weight.numel() for weight in weights.values()), pieces)


def median(metric: Numbers) -> float:
    """The lower median, as torch.median of all values concatenated."""
    return kth_smallest(metric, (metric.count - 1) // 2)


def total(metric: Numbers) -> float:
    return math.fsum(float(chunk.sum(dtype=np.float64)) for chunk in metric.chunks())


def mean(metric: Numbers) -> float:
    """What the released DLP code takes, whatever its --strategy says."""
    return total(metric) / metric.count


def maximum(metric: Numbers) -> float:
    return max(float(chunk.max()) for chunk in metric.chunks())


def variance(metric: Numbers) -> float:
    """Unbiased variance."""
    centre = mean(metric)
    squares = math.fsum(
        float(np.square(chunk.astype(np.float64) - centre).sum()) for chunk in metric.chunks()
    )
    return squares / (metric.count - 1)


def deviation(metric: Numbers) -> float:
    return math.sqrt(variance(metric))


def outliers(metric: Numbers) -> float:
    """OWL's share of values above 5 times the mean (arXiv 2310.05175, equation 1)."""
    threshold = OWL_OUTLIER * mean(metric)
    return sum(np.count_nonzero(chunk > threshold) for chunk in metric.chunks()) / metric.count


STATISTICS: dict[str, Callable[[Numbers], float]] = {
    "median": median,
    "mean": mean,
    "sum": total,
    "max": maximum,
    "std": deviation,
    "var": variance,
    "outliers": outliers,
}


def statistic_named(name: str) -> Callable[[Numbers], float]:
    if name not in STATISTICS:
        raise UserError(f"unknown statistic {name!r}; there are: {', '.join(STATISTICS)}")
    return STATISTICS[name]
