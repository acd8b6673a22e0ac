"""The arithmetic of a comparison: percentiles, and a speed-up that says how sure it is. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
# Rounds of one run whose medians differ by more than this were not made under the same conditions.
DRIFT_LIMIT = 0.05


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Speedup:
    """Median of the paired ratios baseline / run, and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def latency(samples_ms: np.ndarray) -> Latency:
    """Mean and percentiles of all samples, of any shape."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99))
    return Latency(float(np.mean(samples_ms)), float(p50), float(p90), float(p99))


def speedup(baseline_ms: np.ndarray, run_ms: np.ndarray, seed: int = 0) -> Speedup:
    """How many times faster a run is than a baseline measured in the same rounds.

    Both are float64 [rounds, samples]; sample i of both decodes the token at the same depth, and round r
    of both was made within the same minutes, so their ratio is free of what slows both. Samples of one
    round resemble each other, so the bootstrap draws rounds first and then samples within them (two-stage
    cluster bootstrap; Davison & Hinkley, 1997, section 3.8).
    """
    ratios = baseline_ms / run_ms
    rounds, samples = ratios.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(rounds, size=(RESAMPLES, rounds, 1))
    medians = np.empty(RESAMPLES)
    for index, drawn in enumerate(chosen):
        within = random.integers(samples, size=(rounds, samples))
        medians[index] = np.median(ratios[drawn, within])
    low, high = np.percentile(medians, (2.5, 97.5))
    return Speedup(float(np.median(ratios)), float(low), float(high))


def drift(samples_ms: np.ndarray) -> float:
    """Largest deviation of a round's median from the median of all; float64 [rounds, samples], relative."""
    medians = np.median(samples_ms, axis=1)
    return float(np.abs(medians / np.median(medians) - 1).max())


def is_stable(medians_ms: list[float], tolerance: float = 0.03) -> bool:
    """Whether a warm-up may end: its last median is within `tolerance` of the one before."""
    if len(medians_ms) < 2:
        return False
    previous, last = medians_ms[-2:]
    return abs(last - previous) <= tolerance * previous
