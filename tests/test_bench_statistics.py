"""Percentiles and speed-ups as numbers: exact where they can be, and honest about how sure they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.bench.statistics import drift, is_stable, latency, speedup

SAMPLES = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60)


@given(SAMPLES)
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    result = latency(np.array(samples))
    assert min(samples) <= result.p50 <= result.p90 <= result.p99 <= max(samples)
    assert result.mean == pytest.approx(sum(samples) / len(samples))


def test_percentiles_of_a_known_sample() -> None:
    result = latency(np.arange(101.0).reshape(1, 101))
    assert (result.p50, result.p90, result.p99) == (50, 90, 99)


@given(st.floats(0.1, 50), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_a_constant_ratio_is_found_exactly(ratio: float, rounds: int, samples: int) -> None:
    run = np.random.default_rng(0).uniform(1, 9, (rounds, samples))
    result = speedup(ratio * run, run)
    assert (result.median, result.low, result.high) == pytest.approx((ratio, ratio, ratio))


def test_what_slows_both_alike_does_not_matter() -> None:
    random = np.random.default_rng(1)
    baseline, run = random.uniform(9, 11, (5, 63)), random.uniform(4, 5, (5, 63))
    slowed = random.uniform(1, 3, (5, 63))
    quiet, noisy = speedup(baseline, run), speedup(slowed * baseline, slowed * run)
    assert noisy.median == pytest.approx(quiet.median)
    assert (noisy.low, noisy.high) == pytest.approx((quiet.low, quiet.high))


def test_the_interval_contains_the_truth_about_as_often_as_it_says() -> None:
    """Rounds that differ among themselves, as on a machine whose clock varies: 95% must not mean 60%."""
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(25):
        of_round = np.exp(random.normal(0, 0.03, (8, 1)))
        baseline = 10 * of_round * np.exp(random.normal(0, 0.05, (8, 31)))
        run = 5 * np.exp(random.normal(0, 0.05, (8, 31)))
        result = speedup(baseline, run)
        assert result.low <= result.median <= result.high
        hits += result.low <= 2 <= result.high
    assert hits >= 21


def test_the_interval_narrows_with_more_rounds() -> None:
    random = np.random.default_rng(3)
    baseline, run = 10 * np.exp(random.normal(0, 0.1, (2, 40, 31)))
    few, many = speedup(baseline[:4], run[:4]), speedup(baseline, run)
    assert many.high - many.low < few.high - few.low


def test_the_same_samples_give_the_same_interval() -> None:
    baseline, run = np.random.default_rng(4).uniform(1, 2, (2, 5, 15))
    assert speedup(baseline, run) == speedup(baseline, run)


def test_drift_is_the_round_that_differs_most() -> None:
    rounds = np.array([[10.0, 10, 10], [10, 10, 99], [12, 12, 12]])
    assert drift(rounds) == pytest.approx(0.2)


def test_a_warm_up_ends_when_the_last_two_agree() -> None:
    assert not is_stable([])
    assert not is_stable([10.0])
    assert not is_stable([20.0, 10.0])
    assert is_stable([20.0, 10.0, 10.1])
