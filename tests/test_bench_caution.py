"""What is warned of, and that the noise which it rests on is seen when there is some."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from dlp_deploy.bench.caution import warnings
from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.noise import Noise, Watch
from dlp_deploy.bench.random_model import RandomModel
from dlp_deploy.bench.report import NoiseRecord, Report, Run
from dlp_deploy.bench.shapes import shape_config

from .bench_reports import DENSE, SPARSE, environment, report
from .servers import wait_until

QUIET: dict[str, Any] = {"stolen_share": 0.0, "others_share": 0.0, "core_s": 10.0}
STEADY = np.full((5, 8), 10.0)
# Seconds of a processor, which kernels count in ticks of some milliseconds.
WORK_S = 0.5
ALL_DENSE = {DENSE: STEADY, "onnxruntime-int8-dense": STEADY, "onnxruntime-int4-dense": STEADY}


def whole() -> Report:
    return report(ALL_DENSE | {SPARSE: STEADY})


def warned(
    stored: Report, noise: dict[str, float] | None = None, measured: Sequence[Run] = (), **facts: Any
) -> tuple[str, ...]:
    record = NoiseRecord(**QUIET | (noise or {}))
    return warnings(stored.runs, record, environment(**facts), measured, stored.all_loaded)


def changed(stored: Report, name: str = SPARSE, **changes: Any) -> Report:
    runs = [run.model_copy(update=changes) if run.name == name else run for run in stored.runs]
    return stored.model_copy(update={"runs": tuple(runs)})


def of_all(stored: Report, **changes: Any) -> Report:
    return stored.model_copy(update={"runs": tuple(run.model_copy(update=changes) for run in stored.runs)})


def test_a_quiet_whole_bench_is_warned_of_nothing() -> None:
    assert warned(whole()) == ()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"stolen_share": 0.02}, "the hypervisor took 2.0% of the time"),
        ({"others_share": 0.07}, "other processes used 7% of the time"),
        ({"siblings_share": 0.3}, "other hardware threads of these cores were busy for 30%"),
        ({"beside_share": 0.5}, "the machine's other cores were 50% busy"),
        ({"throttled_share": 0.04}, "quota held threads back for 4.0%"),
    ],
)
def test_each_kind_of_noise_is_named(noise: dict[str, float], message: str) -> None:
    (warning,) = warned(whole(), noise)
    assert message in warning
    # A few ticks of the clock are no evidence, however large their share of a very short run.
    assert warned(whole(), noise | {"core_s": 0.05}) == ()
    (limit,) = noise.values()
    assert warned(whole(), dict.fromkeys(noise, limit / 50)) == ()


def test_a_burst_in_one_run_is_named() -> None:
    stored = changed(whole(), noise=NoiseRecord(**QUIET | {"others_share": 0.2}))
    (warning,) = warned(stored, {"others_share": 0.04})
    assert f"({SPARSE} 20%)" in warning


def test_threads_outside_of_their_cores_are_named() -> None:
    stored = changed(whole(), noise=NoiseRecord(**QUIET | {"others_share": -0.9}))
    (warning,) = warned(stored)
    assert warning.startswith(f"{SPARSE} used 90% more processor time than its cores gave")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settled": False, "warm_ups": 8}, "had not settled after 8 warm-ups"),
        ({"same_tokens": False}, "generated different tokens"),
        ({"drift": 0.3}, "varied by 30% from round to round"),
        ({"reason": "round 4 of 5: died"}, "ended early, and has only the rounds before: round 4 of 5: died"),
        ({"status": "wrong output", "reason": "nan", "tpot_ms": None}, r"is not timed (wrong output): nan"),
    ],
)
def test_doubts_about_a_run_name_it(changes: dict[str, Any], message: str) -> None:
    (warning,) = warned(changed(whole(), **changes))
    assert warning.startswith(SPARSE)
    assert message in warning


@pytest.mark.parametrize(
    ("rounds", "message"), [(1, "no interval is given"), (4, "intervals of 4 rounds are wide")]
)
def test_few_rounds_are_named(rounds: int, message: str) -> None:
    (warning,) = warned(report(dict.fromkeys((*ALL_DENSE, SPARSE), STEADY[:rounds])))
    assert message in warning


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ([DENSE], "dense int8 and int4 in ONNX Runtime was not timed"),
        (
            [DENSE, "onnxruntime-int8-dense", "llamacpp-int4-dense"],
            "dense int4 in ONNX Runtime was not timed",
        ),
        ([], "no dense baseline was timed"),
        (["onnxruntime-int8-dense", "onnxruntime-int4-dense"], "dense fp32 was not timed"),
    ],
)
def test_the_best_dense_run_is_only_the_best_of_those_there_are(dense: list[str], message: str) -> None:
    (warning,) = warned(report(dict.fromkeys((*dense, SPARSE), STEADY)))
    assert message in warning


def test_models_that_took_turns_in_memory_are_named() -> None:
    (warning,) = warned(whole().model_copy(update={"all_loaded": False}))
    assert "memory did not hold all models at once" in warning


def test_a_cache_that_is_nearly_empty_is_named() -> None:
    for deep in ({"prompt_tokens": 256}, {"prompt_tokens": 128, "filled_tokens": 128}):
        assert warned(of_all(whole(), **deep)) == ()
    (warning,) = warned(of_all(whole(), prompt_tokens=64, filled_tokens=16))
    assert "behind 80 to 87 cached tokens" in warning


def test_what_slows_dense_baselines_down_is_named() -> None:
    config = shape_config("smollm2-135m", blocks=1)

    def block_size(size: int) -> int | None:
        return RandomModel(config, 0.0, 0, size).grid_block("onnxruntime", "int4")

    dense = "onnxruntime-int4-dense"
    assert warned(changed(whole(), dense, block_size=block_size(128))) == ()
    (warning,) = warned(changed(whole(), dense, block_size=block_size(32)))
    assert f"({dense} 32)" in warning
    assert "--target none --baseline int4 --force" in warning
    # A fine grid is what a sparse model is exported with.
    assert warned(changed(whole(), SPARSE, block_size=32)) == ()


def test_what_extrapolated_runs_come_from_is_warned_of_too() -> None:
    small, large = (
        whole().run(SPARSE).model_copy(update={"name": f"{SPARSE}-{count}-blocks"}) for count in (4, 8)
    )
    carried_on = {"extrapolated_from": (small.name, large.name), "settled": False, "reason": "died"}
    stored = changed(whole(), **carried_on)
    assert warned(stored, measured=[small, large]) == ()
    hot = NoiseRecord(**QUIET | {"others_share": 0.5})
    found = warned(stored, measured=[small.model_copy(update={"settled": False, "noise": hot}), large])
    assert [line for line in found if small.name in line] == list(found)
    assert len(found) == 2
    dead = small.model_copy(update={"status": "failed", "tpot_ms": None, "reason": "died"})
    (warning,) = warned(changed(stored, status="failed", tpot_ms=None), measured=[dead, large])
    assert warning.startswith(f"{SPARSE} is not timed")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"governor": "powersave"}, "governor is powersave"),
        ({"memory_bandwidth_spread": 0.3}, "at rates 30% apart"),
    ],
)
def test_an_unsteady_machine_is_named(facts: dict[str, Any], message: str) -> None:
    (warning,) = warned(whole(), **facts)
    assert message in warning
    assert warned(whole(), governor="performance", memory_bandwidth_spread=0.02) == ()


def test_cores_on_more_than_one_node_are_named() -> None:
    assert warned(whole(), nodes_used=(0,)) == ()
    (warning,) = warned(whole(), nodes_used=(0, 1))
    assert "NUMA nodes 0 and 1" in warning


def test_cores_on_a_node_without_memory_are_named() -> None:
    assert warned(whole(), nodes_used=(1,), nodes_with_memory=(0, 1)) == ()
    (warning,) = warned(whole(), nodes_used=(1,), nodes_with_memory=(0,))
    assert "NUMA node 1 has no memory" in warning


@contextmanager
def busy(core: int) -> Iterator[Callable[[], None]]:
    """A process that keeps a core busy; what is yielded waits until it has worked for WORK_S more."""
    command = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        of_it = psutil.Process(process.pid)

        def work() -> None:
            used = of_it.cpu_times().user + WORK_S
            wait_until(lambda: of_it.cpu_times().user >= used)

        try:
            yield work
        finally:
            process.kill()


def test_a_busy_process_on_the_core_is_seen() -> None:
    (core,) = choose_cores(1)
    with busy(core) as work:
        noise = watched(core, work)
    # However little of its time the core gave, that is what others used of it.
    assert noise.others_s > WORK_S / 2
    assert noise.core_s > WORK_S / 2
    assert noise.record().others_share == pytest.approx(noise.others_s / noise.core_s)


def test_a_busy_process_on_another_core_is_seen_beside() -> None:
    cores = choose_cores(None)
    if len(cores) < 2:
        assert Watch(cores).beside == ()
        return
    with busy(cores[-1]) as work:
        noise = watched(cores[0], work)
    assert noise.beside_s > WORK_S / 2
    assert set(Watch(cores[:1]).beside) >= set(cores[1:])


def test_work_outside_of_the_cores_makes_others_negative() -> None:
    (core,) = choose_cores(1)
    # A run that says it used more than the core had to give.
    noise = watched(core, own_s=iter([0.0, 1e6]))
    assert noise.record().others_share < -1


def watched(
    core: int, work: Callable[[], None] = lambda: None, own_s: Iterator[float] | None = None
) -> Noise:
    own = own_s or iter([0.0, 0.0])
    with Watch((core,))(lambda: next(own)) as noise:
        work()
    return noise


def test_noise_adds_up() -> None:
    total = sum((Noise(core_s=2, others_s=1), Noise(core_s=2, beside_core_s=4, beside_s=1)), Noise())
    assert total.record() == NoiseRecord(
        core_s=4, stolen_share=0, others_share=0.25, beside_share=0.25, siblings_share=0, throttled_share=0
    )
