"""How the time per token of a run divides into parts that cores share, that memory takes, and the rest.

Amdahl's law (1967), with a floor under what the cores share: reading the weights.
"""

from __future__ import annotations

from itertools import product

import numpy as np


def fit_parts(cores: np.ndarray, times_ms: np.ndarray, memory_ms: np.ndarray) -> tuple[float, float]:
    """(compute, serial) of time = max(compute / cores, memory) + serial, neither negative, by least squares.

    All float [reports]. Where memory was the limit everywhere, `compute` is the most that it can have been.
    With one number of cores there is no telling what is serial, which is taken as zero.
    """
    if len(set(cores.tolist())) < 2:
        return float((times_ms * cores).mean()), 0.0
    fits = [
        _fit(cores, times_ms, memory_ms, np.array(computing))
        for computing in product((True, False), repeat=len(cores))
    ]

    def deviation(fit: tuple[float, float]) -> float:
        expected = np.maximum(fit[0] / cores, memory_ms) + fit[1]
        return float(np.square(expected - times_ms).sum())

    return min(fits, key=deviation)


def _fit(
    cores: np.ndarray, times_ms: np.ndarray, memory_ms: np.ndarray, computing: np.ndarray
) -> tuple[float, float]:
    """The same where it is known which reports were `computing`, bool [reports]; others waited for memory."""
    known = np.where(computing, 0.0, memory_ms)
    if not computing.any():
        return float((memory_ms * cores).min()), max(0.0, float((times_ms - known).mean()))
    terms = np.stack([np.where(computing, 1 / cores, 0.0), np.ones(len(cores))], axis=1)
    (compute, serial), *_ = np.linalg.lstsq(terms, times_ms - known, rcond=None)
    if serial < 0:
        return float((times_ms * cores)[computing].mean()), 0.0
    return (float(compute), float(serial)) if compute > 0 else (0.0, float((times_ms - known).mean()))
