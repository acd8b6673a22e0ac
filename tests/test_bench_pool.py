"""How long a model is warmed up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dlp_deploy import bench
from dlp_deploy.bench import pool

from .bench_artifacts import exported_artifact


@pytest.mark.parametrize(("most", "seconds", "expected"), [(3, 3600.0, 3), (8, 0.0, 2)])
def test_what_does_not_settle_is_warmed_up_so_often_or_so_long(
    most: int,
    seconds: float,
    expected: int,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = exported_artifact(
        tiny_checkpoint("llama"), tmp_path / "tiny", quant="fp32", target="onnxruntime", baseline="none"
    )
    monkeypatch.setattr(pool, "WARM_UPS", most)
    monkeypatch.setattr(pool, "LONG_WARM_UP_S", seconds)
    monkeypatch.setattr(pool, "is_stable", lambda medians: False)
    report = bench(
        artifact,
        engine="onnxruntime",
        baseline="none",
        context=64,
        prompt_tokens=16,
        new_tokens=4,
        repeats=2,
        eval_windows=0,
        output=tmp_path / "report.json",
    )
    (run,) = report.runs
    assert (run.status, run.warm_ups, run.settled) == ("ok", expected, False)
    assert any(f"had not settled after {expected} warm-ups" in warning for warning in report.warnings)
