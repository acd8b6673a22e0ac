"""What becomes of a bench that is stopped, or whose engines fail, err or change their mind while timed.

The engine is ONNX Runtime's own worker with one fault in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_deploy.artifact import Manifest
from dlp_deploy.bench import bench, pool, run
from dlp_deploy.bench.markdown import to_markdown
from dlp_deploy.bench.plan import Candidate, plan_runs
from dlp_deploy.bench.report import Report, read_report
from dlp_deploy.bench.table_csv import to_csv
from dlp_deploy.bench.worker import EngineWorker, Generation

from .bench_artifacts import exported_artifact
from .limits import short_limit

SPARSE, DENSE = "onnxruntime-fp32-s70", "onnxruntime-fp32-dense"
QUICK: dict[str, Any] = {"engine": "onnxruntime", "cores": 1, "prompt_tokens": 20, "new_tokens": 6}
QUICK |= {"context": 150, "repeats": 3, "eval_windows": 0}
FAULTY = """
import os, time
import numpy as np
from engine_workers import onnxruntime

FAULT = os.environ["FAULT"]

class Session(onnxruntime.Session):
    texts = 0

    def restart(self):
        super().restart()
        self.texts += 1

    def extend(self, ids):
        logits = super().extend(ids)
        # The texts are: the reference, the check at depth, two warm-ups, and the rounds.
        if FAULT == "dies in round 2" and self.texts == 6:
            os.write(2, b"Assertion failed: a bug\\n")
            os.abort()
        if FAULT == "hangs in round 1" and self.texts == 5:
            time.sleep(600)
        if FAULT == "errs at depth" and self._cache.done > 100:
            return np.roll(logits, 1)
        if FAULT == "is not finite in round 3" and self.texts == 7:
            return logits * np.float32("nan")
        if FAULT == "changes its mind" and self.texts == 6:
            return np.roll(logits, 1)
        return logits
"""


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all models at once, whatever else is in memory: each text is counted where the faults are."""
    monkeypatch.setattr(pool, "available_memory", lambda: 1 << 40)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return exported_artifact(
        tiny_checkpoint("llama"),
        tmp_path_factory.mktemp("rounds") / "tiny-s70",
        quant="fp32",
        target="onnxruntime",
        baseline="fp32",
    )


@pytest.fixture
def measured(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """`measured(fault)`: the report of a bench whose sparse run has that fault."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setattr(pool, "WARM_UPS", 2)

    def faulty(folder: Path, manifest: Manifest, engine: str, baseline: str | None) -> tuple[Candidate, ...]:
        planned = plan_runs(folder, manifest, engine, baseline)
        engines = {c: replace(c.engine, worker=str(tmp_path / "faulty.py")) for c in planned if not c.dense}
        return tuple(replace(c, engine=engines.get(c, c.engine)) for c in planned)

    def measured(fault: str, **options: Any) -> Report:
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setattr(run, "plan_runs", faulty)
        return bench(artifact, output=tmp_path / "r.json", **QUICK | options)

    return measured


def test_without_a_fault_all_is_checked_at_the_timed_depth(measured: Callable[..., Report]) -> None:
    report = measured("none")
    sparse, dense = report.run(SPARSE), report.run(DENSE)
    assert (sparse.status, sparse.reason, sparse.same_tokens) == ("ok", "", True)
    # 150 positions less prompt and new tokens are 124, of which a multiple of 16 is filled.
    assert sparse.filled_tokens == dense.filled_tokens == 112
    check = sparse.depth_check
    assert check is not None
    assert (check.reference, check.depth, check.positions) == ("torch", 132, 6)
    assert check.max_rel_error is not None
    assert check.max_rel_error < 1e-5
    assert check.greedy_match == 1
    assert sparse.tokens_sha256 is not None
    assert sparse.tokens_sha256 != dense.tokens_sha256
    assert sparse.noise is not None
    assert sparse.noise.core_s > 0
    text = to_markdown(report)
    assert "| 132 to 137 |" in text
    # Of the dense model there is no checkpoint to ask torch of, and no other run.
    assert f"Only known to be finite there, for want of a reference: {DENSE}." in text


def test_the_rounds_that_were_finished_before_a_crash_are_kept(measured: Callable[..., Report]) -> None:
    report = measured("dies in round 2")
    sparse, dense = report.run(SPARSE), report.run(DENSE)
    assert sparse.status == "ok"
    assert sparse.reason.startswith("round 2 of 3: onnxruntime (generate) was ended by SIGABRT")
    assert "last words: Assertion failed: a bug" in sparse.reason
    assert (sparse.samples.shape, dense.samples.shape) == ((1, 5), (3, 5))
    comparison = report.speedup_over(SPARSE, DENSE)
    assert comparison is not None
    assert comparison.ci95 is None
    assert any(f"{SPARSE} ended early" in warning for warning in report.warnings)
    assert any("no interval is given" in warning for warning in report.warnings)
    assert "(one round, no interval)" in to_markdown(report)
    assert ",," in to_csv(report)


def test_a_run_that_hangs_is_ended_after_the_time_limit(
    measured: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Behind two warm-ups.
    short_limit(monkeypatch, "/onnxruntime/", text=3, seconds=3)
    report = measured("hangs in round 1")
    assert report.run(SPARSE).status == "failed"
    assert "gave no answer for 3 s" in report.run(SPARSE).reason
    assert report.run(DENSE).status == "ok"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("errs at depth", "logits at the timed depth against torch"),
        ("is not finite in round 3", "not all finite numbers while it is timed"),
    ],
)
def test_wrong_output_where_it_is_timed_is_not_timed(
    measured: Callable[..., Report], fault: str, reason: str
) -> None:
    report = measured(fault)
    assert report.run(SPARSE).status == "wrong output"
    assert reason in report.run(SPARSE).reason
    assert report.run(SPARSE).tpot_ms is None
    assert report.run(DENSE).status == "ok"
    assert report.comparisons == ()


def test_other_tokens_in_other_rounds_are_warned_of(measured: Callable[..., Report]) -> None:
    report = measured("changes its mind")
    run = report.run(SPARSE)
    assert (run.status, run.same_tokens) == ("ok", False)
    assert any(f"{SPARSE} generated different tokens" in warning for warning in report.warnings)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`interrupted(n)`: Ctrl-C is pressed in the n-th generation."""

    def interrupted(number: int) -> None:
        generate, calls = EngineWorker.generate, iter(range(1, 1000))

        def counted(self: EngineWorker, *arguments: Any) -> Generation:
            if next(calls) == number:
                raise KeyboardInterrupt
            return generate(self, *arguments)

        monkeypatch.setattr(EngineWorker, "generate", counted)

    return interrupted


def test_ctrl_c_leaves_a_report_of_what_is_finished(
    artifact: Path,
    tmp_path: Path,
    interrupted: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pool, "WARM_UPS", 2)
    # Two runs with two warm-ups each, one whole round, and half of the next.
    interrupted(4 + 2 + 2)
    with pytest.raises(KeyboardInterrupt):
        bench(artifact, output=tmp_path / "r.json", **QUICK)
    report = read_report(tmp_path / "r.json")
    assert sorted(len(each.samples) for each in report.runs) == [1, 2]
    assert all(each.reason == "stopped by Ctrl-C" for each in report.runs)
    assert report.warnings[0].startswith("the bench was stopped by Ctrl-C")
    assert report.speedup_over(SPARSE, DENSE) is not None
    assert "writing the report of what is finished" in capsys.readouterr().err
    assert (tmp_path / "r.md").exists()


def test_ctrl_c_before_anything_is_finished_leaves_nothing(
    artifact: Path, tmp_path: Path, interrupted: Callable[[int], None]
) -> None:
    interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        bench(artifact, output=tmp_path / "new" / "r.json", **QUICK)
    assert not (tmp_path / "new").exists()


def test_a_perplexity_beyond_all_numbers_is_noted_and_the_report_read_back(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineWorker, "window_nll", lambda self, windows: np.full((1, 31), 1e5, np.float32))
    options = QUICK | {"baseline": "none", "repeats": 1, "eval_windows": 1, "eval_tokens": 32}
    report = bench(artifact, output=tmp_path / "r.json", **options)
    assert read_report(tmp_path / "r.json") == report
    assert report.run(SPARSE).perplexity is None
    assert "its perplexity is no finite number" in report.run(SPARSE).notes


def test_a_later_step_that_fails_does_not_cost_the_latencies(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise MemoryError("no room for the windows")

    monkeypatch.setattr(run, "measure_perplexity", fails)
    with pytest.raises(MemoryError):
        bench(artifact, output=tmp_path / "r.json", **QUICK | {"eval_windows": 1, "eval_tokens": 32})
    report = read_report(tmp_path / "r.json")
    assert [len(each.samples) for each in report.runs] == [3, 3]
    assert "MemoryError: no room for the windows" in report.warnings[0]


def test_a_plot_that_fails_does_not_cost_the_report(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(report: Report) -> None:
        raise MemoryError("no room for the picture")

    monkeypatch.setattr(run, "overview", fails)
    with pytest.raises(MemoryError):
        bench(artifact, output=tmp_path / "new" / "r.json", **QUICK)
    report = read_report(tmp_path / "new" / "r.json")
    assert [len(each.samples) for each in report.runs] == [3, 3]
    assert (tmp_path / "new" / "r.csv").exists()
