"""The arithmetic of a comparison: percentiles, and a speed-up that says how sure it is. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Rounds of one run whose medians differ by more than this were not made under the same conditions.
DRIFT_LIMIT = 0.05
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond them the normal one is near.
_STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)

Interval = tuple[float, float]


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95 % interval; None where there are too few rounds to tell."""

    value: float
    interval: Interval | None


def latency(samples_ms: np.ndarray) -> Latency:
    """Mean and percentiles of all samples, of any shape."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99))
    return Latency(float(np.mean(samples_ms)), float(p50), float(p90), float(p99))


def speedup(baseline_ms: np.ndarray, run_ms: np.ndarray) -> Ratio:
    """How many times faster a run is than a baseline measured in the same rounds: the median of all ratios.

    Both are float64 [rounds, samples]; sample i of both decodes the token at the same depth, and round r of
    both was made in the same turn of all runs, so their ratio is free of what slows both for longer than
    that. (Where memory does not hold all models, some are loaded in each turn, which takes minutes.) Samples
    of one round resemble each other, so the interval is Student's, over the logarithms of the rounds'
    medians. (A bootstrap of so few rounds claims too much: of five it holds the truth 4 times in 5.)
    """
    ratios = baseline_ms / run_ms
    return _ratio(float(np.median(ratios)), np.log(np.median(ratios, axis=1)))


def ratio_of_medians(after: np.ndarray, before: np.ndarray) -> Ratio:
    """How `after` compares with `before`, float64 [rounds, samples] each, made at different times, so that
    nothing is paired."""
    logs = [np.log(np.median(samples, axis=1)) for samples in (after, before)]
    return _ratio(float(np.median(after) / np.median(before)), *logs)


def ratio_of_speedups(after: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray]) -> Ratio:
    """The same for two speed-ups, each from (baseline, run) of its own interleaved rounds."""
    paired = [baseline / run for baseline, run in (alike(*pair) for pair in (after, before))]
    return ratio_of_medians(paired[0], paired[1])


def alike(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the rounds that both have, in the same shape: by medians of rounds where one, being
    extrapolated, has no others."""
    rounds = min(len(one), len(other))
    one, other = one[:rounds], other[:rounds]
    if one.shape == other.shape:
        return one, other
    return np.median(one, axis=1, keepdims=True), np.median(other, axis=1, keepdims=True)


def _ratio(value: float, logs: np.ndarray, subtracted: np.ndarray | None = None) -> Ratio:
    """A ratio whose logarithm is estimated by the mean of `logs` (less that of `subtracted`), one a round.

    For two samples the degrees of freedom are those of the smaller, which is never too few (Welch).
    """
    samples = [logs] if subtracted is None else [logs, subtracted]
    fewest = min(map(len, samples))
    if fewest < 2:
        return Ratio(value, None)
    middle = float(logs.mean() - (subtracted.mean() if subtracted is not None else 0.0))
    error = float(np.sqrt(sum(sample.var(ddof=1) / len(sample) for sample in samples)))
    half = _STUDENT[min(fewest - 1, len(_STUDENT)) - 1] * error
    # The median of all tokens is not the mean of rounds; an interval without its own estimate would confuse.
    low, high = float(np.exp(middle - half)), float(np.exp(middle + half))
    return Ratio(value, (min(low, value), max(high, value)))


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
