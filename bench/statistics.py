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


@dataclass(frozen=True)
class Ratio:
    """After / before, and its 95 % bootstrap interval."""

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
    low, high = np.percentile(_resampled_medians(ratios, np.random.default_rng(seed)), (2.5, 97.5))
    return Speedup(float(np.median(ratios)), float(low), float(high))


def ratio_of_medians(after: np.ndarray, before: np.ndarray, seed: int = 0) -> Ratio:
    """How `after` compares with `before`, float64 [rounds, samples] each, made at different times: nothing is
    paired, so each is resampled by itself."""
    random = np.random.default_rng(seed)
    drawn = _resampled_medians(after, random) / _resampled_medians(before, random)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Ratio(float(np.median(after) / np.median(before)), float(low), float(high))


def ratio_of_speedups(
    after: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray], seed: int = 0
) -> Ratio:
    """The same for two speed-ups, each from (baseline, run) of its own interleaved rounds."""
    paired = [baseline / run for baseline, run in (alike(*pair) for pair in (after, before))]
    return ratio_of_medians(paired[0], paired[1], seed)


def alike(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the same rounds in the same shape: by medians of rounds where one, being extrapolated, has
    no others."""
    if one.shape == other.shape:
        return one, other
    return np.median(one, axis=1, keepdims=True), np.median(other, axis=1, keepdims=True)


def _resampled_medians(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Medians of bootstrap samples of [rounds, samples], drawn by rounds and then within them."""
    rounds, samples = values.shape
    chosen = random.integers(rounds, size=(RESAMPLES, rounds, 1))
    medians = np.empty(RESAMPLES)
    for index, drawn in enumerate(chosen):
        within = random.integers(samples, size=(rounds, samples))
        medians[index] = np.median(values[drawn, within])
    return medians


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
