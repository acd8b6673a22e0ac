"""A whole model from two runs with some of its blocks: its figures, and what is not to be said of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dlp_deploy.bench.caution import warnings
from dlp_deploy.bench.extrapolate import extrapolate
from dlp_deploy.bench.report import NoiseRecord, Run

from .bench_reports import DENSE, environment, report


def test_times_are_carried_on_along_a_line() -> None:
    fixed, per_block = 5.0, np.array([[1.0, 1.1, 0.9], [1.2, 1.2, 1.5]])
    facts = environment()
    times = {count: fixed + count * per_block for count in (2, 4, 32)}
    runs = {
        count: report({"onnxruntime-fp32-dense": found}, count * 0.01)
        .runs[0]
        .model_copy(update={"blocks": count})
        for count, found in times.items()
    }
    whole = extrapolate(runs[2], runs[4], "whole", 32, facts)
    np.testing.assert_allclose(whole.samples_ms, np.median(times[32], axis=1))
    assert whole.tokens_per_s == pytest.approx(1000 / times[32].mean())
    assert whole.weight_bytes == runs[32].weight_bytes
    assert whole.roofline is not None
    assert whole.roofline.weight_bytes == runs[32].weight_bytes
    assert whole.tpot_ms is not None
    assert whole.ttft_ms is not None
    assert whole.ttft_ms.p50 == pytest.approx(np.median(runs[32].ttft_samples_ms))
    assert (whole.peak_rss_bytes, whole.blocks, whole.extrapolated_from) == (None, None, (runs[2].name,) * 2)
    assert whole.notes[-1] == "extrapolated from 2 and 4 of 32 decoder blocks"
    # Noise beyond sense is no figure, and neither is half of a pair.
    assert extrapolate(runs[32], runs[4].model_copy(update={"blocks": 64}), "x", 99, facts).status == "failed"
    for status in ("failed", "wrong output"):
        broken = runs[2].model_copy(update={"status": status, "reason": "it died", "name": "two"})
        failed = extrapolate(broken, runs[4], "whole", 32, facts)
        assert (failed.status, failed.reason, failed.tpot_ms) == (status, "two: it died", None)
        assert failed.weight_bytes == runs[32].weight_bytes


def test_what_is_wrong_with_the_smaller_run_is_wrong_with_the_whole() -> None:
    times = np.random.default_rng(0).uniform(9, 11, (5, 8))
    facts = environment()

    def measured(blocks: int, rounds: int, **changes: Any) -> Run:
        (run,) = report({DENSE: blocks * times[:rounds]}, blocks * 0.01).runs
        return run.model_copy(update={"name": f"{blocks} blocks", "blocks": blocks} | changes)

    noisy, quiet = (
        NoiseRecord(stolen_share=0, others_share=share, core_s=seconds)
        for share, seconds in ((0.5, 1), (0.1, 3))
    )
    early = {"reason": "round 3 of 5: it died", "settled": False, "same_tokens": False, "warm_ups": 8}
    small = measured(2, 2, **early, noise=noisy)
    large = measured(4, 5, warm_ups=3, noise=quiet, tokens_sha256="of another model")
    whole = extrapolate(small, large, "whole", 32, facts)
    assert (whole.status, whole.reason) == ("ok", "2 blocks: round 3 of 5: it died")
    assert (whole.settled, whole.same_tokens, whole.warm_ups) == (False, False, 8)
    assert len(whole.samples) == 2
    assert whole.noise is not None
    assert (whole.noise.others_share, whole.noise.core_s) == (pytest.approx(0.2), 4)
    assert whole.tokens_sha256 is None
    sound = extrapolate(measured(2, 5), large, "whole", 32, facts)
    assert (sound.reason, sound.settled, sound.same_tokens) == ("", True, True)


def test_an_extrapolation_that_no_memory_could_feed_is_named() -> None:
    (run,) = report({DENSE: np.full((3, 8), 5.0)}, gigabytes=0.1).runs
    quiet = NoiseRecord(stolen_share=0, others_share=0)
    # What was measured may have been in the caches.
    telling = "200% of the measured bandwidth"
    assert not any(telling in warning for warning in warnings([run], quiet))
    carried_on = run.model_copy(update={"extrapolated_from": ("two", "four")})
    assert sum(telling in warning for warning in warnings([carried_on], quiet)) == 1


def test_a_round_in_which_the_smaller_run_was_disturbed_is_at_least_that_of_the_larger() -> None:
    times = np.ones((5, 8))
    facts = environment()

    def measured(blocks: int, factors: list[float]) -> Run:
        (run,) = report({DENSE: blocks * times * np.array(factors)[:, None]}, blocks * 0.01).runs
        return run.model_copy(update={"name": f"{blocks} blocks", "blocks": blocks})

    steady = [1.0] * 5
    whole = extrapolate(measured(2, [1, 1, 5, 1, 1]), measured(4, steady), "whole", 32, facts)
    assert whole.samples.ravel().tolist() == pytest.approx([32, 32, 4, 32, 32])
    assert whole.tpot_ms is not None
    assert whole.tpot_ms.p50 == pytest.approx(32)
    failed = extrapolate(measured(2, [3] * 5), measured(4, steady), "whole", 32, facts)
    assert failed.status == "failed"
    assert failed.reason == "4 blocks took no longer than 2: the machine is too noisy"
