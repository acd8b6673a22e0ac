"""Percentiles and speed-ups as numbers: exact where they can be, and honest about how sure they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.bench.statistics import Ratio, drift, is_stable, latency, ratio_of_medians, speedup

SAMPLES = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=60)


@given(SAMPLES)
def test_percentiles_are_ordered_and_within_the_samples(samples: list[float]) -> None:
    result = latency(np.array(samples))
    assert min(samples) <= result.p50 <= result.p90 <= result.p99 <= max(samples)
    assert result.mean == pytest.approx(sum(samples) / len(samples))


def test_percentiles_of_a_known_sample() -> None:
    result = latency(np.arange(101.0).reshape(1, 101))
    assert (result.p50, result.p90, result.p99) == (50, 90, 99)


@given(st.floats(0.1, 50), st.integers(2, 9), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_a_constant_ratio_is_found_exactly(ratio: float, rounds: int, samples: int) -> None:
    run = np.random.default_rng(0).uniform(1, 9, (rounds, samples))
    result = speedup(ratio * run, run)
    assert result.interval is not None
    assert (result.value, *result.interval) == pytest.approx((ratio, ratio, ratio))


def test_one_round_tells_nothing_of_certainty() -> None:
    random = np.random.default_rng(5)
    one, five = random.uniform(9, 11, (1, 63)), random.uniform(9, 11, (5, 63))
    assert speedup(one, one / 2) == Ratio(2, None)
    assert ratio_of_medians(five, one).interval is None
    assert ratio_of_medians(five, five).interval is not None


def test_what_slows_both_alike_does_not_matter() -> None:
    random = np.random.default_rng(1)
    baseline, run = random.uniform(9, 11, (5, 63)), random.uniform(4, 5, (5, 63))
    slowed = random.uniform(1, 3, (5, 63))
    quiet, noisy = speedup(baseline, run), speedup(slowed * baseline, slowed * run)
    assert noisy.value == pytest.approx(quiet.value)
    assert noisy.interval == pytest.approx(quiet.interval)


def rounds_of(milliseconds: float, rounds: int, random: np.random.Generator) -> np.ndarray:
    """Times [rounds, 63] of rounds that differ among themselves, as on a machine whose clock varies."""
    of_round = random.normal(0, 0.03, (rounds, 1))
    return milliseconds * np.exp(of_round + random.normal(0, 0.05, (rounds, 63)))


@pytest.mark.parametrize("rounds", [2, 3, 5, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(rounds: int) -> None:
    """Of 2000 intervals at 95 %, 1900 hold it, give or take 30 (three standard errors)."""
    random = np.random.default_rng(rounds)
    alone = paired = 0
    for _ in range(2000):
        baseline, run = rounds_of(10, rounds, random), rounds_of(5, rounds, random)
        found, compared = speedup(baseline, run), ratio_of_medians(baseline, run)
        assert found.interval is not None
        assert compared.interval is not None
        assert found.interval[0] <= found.value <= found.interval[1]
        paired += found.interval[0] <= 2 <= found.interval[1]
        alone += compared.interval[0] <= 2 <= compared.interval[1]
    assert 1870 <= paired <= 1935
    # Nothing is paired there, so its interval is on the safe side.
    assert alone >= 1870


def test_the_interval_narrows_with_more_rounds() -> None:
    random = np.random.default_rng(3)
    baseline, run = 10 * np.exp(random.normal(0, 0.1, (2, 40, 31)))
    few, many = (speedup(baseline[:rounds], run[:rounds]).interval for rounds in (4, 40))
    assert few is not None
    assert many is not None
    assert many[1] - many[0] < few[1] - few[0]


def test_drift_is_the_round_that_differs_most() -> None:
    rounds = np.array([[10.0, 10, 10], [10, 10, 99], [12, 12, 12]])
    assert drift(rounds) == pytest.approx(0.2)


def test_a_warm_up_ends_when_the_last_two_agree() -> None:
    assert not is_stable([])
    assert not is_stable([10.0])
    assert not is_stable([20.0, 10.0])
    assert is_stable([20.0, 10.0, 10.1])
