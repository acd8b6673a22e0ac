"""From the likelihood of each token to a perplexity that says how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` = exp(mean NLL), inf where that is too large for a float; `stderr` is its standard error,
    taken over windows (delta method).

    Tokens of one window are not independent, so the windows are the sample: with few of them the
    standard error is itself uncertain, and with one it is nan.
    """

    perplexity: float
    stderr: float
    tokens: int
    windows: int


def perplexity_of(nll: np.ndarray) -> Perplexity:
    """nll float32 [windows, tokens]: negative log-likelihoods in nats."""
    per_window = nll.mean(axis=1, dtype=np.float64)
    with np.errstate(over="ignore"):
        value = float(np.exp(per_window.mean()))
    spread = per_window.std(ddof=1) / math.sqrt(len(per_window)) if len(per_window) > 1 else math.nan
    return Perplexity(value, value * spread, nll.size, len(nll))
