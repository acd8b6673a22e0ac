"""The bench from artifact to report, in the real engines on a small artifact."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from psutil import pid_exists
from rich.console import Console

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench import bench, pool
from dlp_deploy.bench.engines import engine_named, has_room
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.markdown import to_markdown
from dlp_deploy.bench.outcome import Outcome, Workload
from dlp_deploy.bench.plan import plan_runs
from dlp_deploy.bench.pool import load
from dlp_deploy.bench.present import print_report
from dlp_deploy.bench.report import SCHEMA_FILE, Report, json_schema, read_report, to_json
from dlp_deploy.bench.table_csv import to_csv
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.errors import UserError

from .artifacts import sealed
from .bench_artifacts import exported_artifact

QUICK: dict[str, Any] = {"cores": 1, "prompt_tokens": 20, "new_tokens": 6, "repeats": 2, "eval_windows": 0}
QUICK |= {"context": 26}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return exported_artifact(tiny_checkpoint("llama"), tmp_path_factory.mktemp("bench") / "tiny-s70")


@pytest.fixture(scope="module")
def report(artifact: Path) -> Report:
    install("deepsparse")
    options = QUICK | {"context": 110, "eval_windows": 2, "eval_tokens": 60}
    return bench(artifact, engine="all", **options)


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """An artifact of the test's own, to be damaged at will."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def test_every_run_is_measured(report: Report) -> None:
    assert [run.name for run in report.runs] == [
        "onnxruntime-fp32-dense",
        "onnxruntime-int8-dense",
        "deepsparse-fp32-s70",
        "deepsparse-int8-s70",
        "onnxruntime-fp32-s70",
        "onnxruntime-int8-s70",
        "torch-fp32-s70",
    ]
    for run in report.runs:
        assert (run.status, run.reason) == ("ok", "")
        assert (run.cores, run.prompt_tokens, run.new_tokens, run.context) == (1, 20, 6, 110)
        assert run.tpot_ms is not None
        assert run.ttft_ms is not None
        assert len(run.samples_ms) == 2 * run.samples_per_round == 2 * 5
        assert len(run.ttft_samples_ms) == 2
        assert run.tpot_ms.p50 == pytest.approx(np.median(run.samples_ms))
        assert run.tokens_per_s == pytest.approx(1000 / np.mean(run.samples_ms))
        assert run.peak_rss_bytes is not None
        assert run.peak_rss_bytes > run.weight_bytes
        assert run.block_size == {"onnxruntime-int8-dense": 128, "onnxruntime-int8-s70": 32}.get(run.name)
        assert run.warm_ups >= 2
        # Of 84 positions before the prompt, as many as are a multiple of 16.
        assert run.filled_tokens == 80


def test_all_runs_of_a_model_are_checked_at_the_depth_that_is_timed(report: Report) -> None:
    for run in report.runs:
        check = run.depth_check
        if run.name == "onnxruntime-fp32-dense":
            # Of the dense model there is no checkpoint, and no other run in fp32.
            assert check is None
            continue
        assert check is not None
        assert check.reference == ("onnxruntime-fp32-dense" if run.dense else "torch")
        assert (check.depth, check.positions) == (100, 6)
        assert run.tokens_sha256 is not None
    fp32 = {run.tokens_sha256 for run in report.runs if run.precision == "fp32" and not run.dense}
    assert len(fp32) == 1


def test_outputs_were_checked_before(report: Report) -> None:
    for run in report.runs:
        check = run.output_check
        assert check is not None
        assert check.positions == 33
        if run.precision == "fp32":
            assert check.limited == "max_rel_error"
            assert check.max_rel_error is not None
            assert check.max_rel_error < 1e-5
        else:
            assert check.limited == "mean_rel_error"
            assert check.mean_rel_error is not None
            assert check.mean_rel_error <= check.limit


def test_perplexity_is_that_of_the_model_in_each_engine(report: Report) -> None:
    found = {run.name: run.perplexity for run in report.runs}
    sparse = found["torch-fp32-s70"]
    assert sparse is not None
    assert found["deepsparse-fp32-s70"] == pytest.approx(sparse, rel=1e-4)
    assert found["onnxruntime-fp32-s70"] == pytest.approx(sparse, rel=1e-4)
    assert found["deepsparse-int8-s70"] == pytest.approx(sparse, rel=0.05)
    assert found["onnxruntime-fp32-dense"] != pytest.approx(sparse, rel=1e-3)
    assert report.evaluation is not None
    assert (report.evaluation.windows, report.evaluation.tokens_per_window) == (2, 60)


def test_every_run_is_compared_with_every_dense_one(report: Report) -> None:
    pairs = {(comparison.run, comparison.baseline) for comparison in report.comparisons}
    dense = {run.name for run in report.runs if run.dense}
    assert pairs == {(run.name, base) for run in report.runs for base in dense if run.name != base}
    for comparison in report.comparisons:
        assert comparison.ci95 is not None
        assert comparison.ci95[0] <= comparison.speedup <= comparison.ci95[1]
    assert report.dense_fp32 == "onnxruntime-fp32-dense"
    assert report.best_dense in dense


def test_the_environment_says_what_was_used(report: Report) -> None:
    environment = report.environment
    assert len(environment.cores_used) == 1
    assert environment.memory_bandwidth_gbps > 0
    assert environment.engines["deepsparse"].versions["deepsparse"] == "1.8.0"
    assert "not open source" in environment.engines["deepsparse"].licence
    assert set(environment.engines) == {"deepsparse", "onnxruntime", "torch"}
    assert report.command["engine"] == "all"
    assert report.command["context"] == 110


def test_every_run_is_placed_under_the_roofs(report: Report) -> None:
    assert report.environment.peak_int8_gops is not None
    for run in report.runs:
        limits = run.roofline
        assert limits is not None
        assert limits.estimated == (run.engine == "deepsparse")
        assert run.tpot_ms is not None
        moved = limits.gbps * run.tpot_ms.p50 * 1e6
        assert moved == pytest.approx(limits.weight_bytes + limits.kv_bytes, rel=1e-6)
        assert limits.bandwidth_share == pytest.approx(limits.gbps / report.environment.memory_bandwidth_gbps)


def test_the_report_is_written_in_all_forms(report: Report, artifact: Path) -> None:
    folder = artifact.parent / "tiny-s70.bench"
    assert sorted(path.name for path in folder.iterdir()) == [
        "report.csv",
        "report.json",
        "report.md",
        "report.png",
        "report.roofline.png",
        "report.roofline.svg",
        "report.svg",
    ]
    assert read_report(folder / "report.json") == report
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert [row["run"] for row in rows] == [run.name for run in report.runs]
    for row, run in zip(rows, report.runs, strict=True):
        assert run.ttft_ms is not None
        assert float(row["ttft_ms_p99"]) == run.ttft_ms.p99
        assert float(row["drift"]) == run.drift
        compared = report.speedup_over(run.name, report.dense_fp32)
        if compared and compared.ci95:
            assert (float(row["dense_fp32_ci95_low"]), float(row["dense_fp32_ci95_high"])) == compared.ci95
    text = (folder / "report.md").read_text()
    assert all(run.name in text for run in report.runs)
    assert all(warning in text for warning in report.warnings)
    assert "not open source" in text


def test_the_contract_of_the_report(report: Report) -> None:
    stored = json.loads(to_json(report))
    assert stored["schema"] == 1
    run = next(run for run in stored["runs"] if run["name"] == "deepsparse-int8-s70")
    assert run["engine"] == "deepsparse"
    assert run["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert set(run["tpot_ms"]) == {"mean", "p50", "p90", "p99"}
    assert {"max_rel_error", "greedy_match"} <= set(run["output_check"])
    assert {"run", "baseline", "speedup", "ci95"} <= set(stored["comparisons"][0])


def test_the_schema_file_is_that_of_the_code() -> None:
    assert SCHEMA_FILE.read_text() == json_schema()


def test_the_table_on_the_terminal(report: Report) -> None:
    stream = io.StringIO()
    print_report(report, Console(file=stream))
    lines = stream.getvalue().splitlines()
    for run in report.runs:
        line = next(line for line in lines if line.strip().startswith(f"{run.name} "))
        assert run.tpot_ms is not None
        assert f" {run.tpot_ms.p50:.2f} " in line
        assert f"{run.perplexity:.2f}" in line
    assert any("decodes at" in line and "95% interval" in line for line in lines)


def test_a_wrong_graph_is_reported_and_not_timed(copy: Path, tmp_path: Path) -> None:
    """Weights of another model: the engine runs, and says something else."""
    data = copy / "onnxruntime" / "model.onnx.data"
    data.write_bytes(
        np.random.default_rng(0).normal(0, 0.1, data.stat().st_size // 4).astype("<f4").tobytes()
    )
    sealed(copy, read_manifest(copy).exports)
    report = bench(copy, engine="onnxruntime", output=tmp_path / "r.json", **QUICK)
    run = report.run("onnxruntime-fp32-s70")
    assert run.status == "wrong output"
    assert "against torch" in run.reason
    assert run.tpot_ms is None
    assert run.samples_ms == ()
    assert not [comparison for comparison in report.comparisons if comparison.run == run.name]
    assert any("onnxruntime-fp32-s70 is not timed (wrong output)" in warning for warning in report.warnings)
    assert report.run("onnxruntime-int8-s70").status == "ok"
    assert "wrong output" in to_markdown(report)
    assert "wrong output" in to_csv(report)


def test_a_run_that_fails_ends_alone(copy: Path, tmp_path: Path) -> None:
    path = copy / "onnxruntime-int8" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, path)
    sealed(copy, read_manifest(copy).exports)
    report = bench(copy, engine="onnxruntime", baseline="fp32", output=tmp_path / "r.json", **QUICK)
    run = report.run("onnxruntime-int8-s70")
    assert run.status == "failed"
    assert "onnxruntime (load)" in run.reason
    assert report.run("onnxruntime-fp32-s70").status == "ok"
    # The last run of the engine told nothing of it.
    assert report.runs[-1] == run
    assert report.environment.engines["onnxruntime"].versions["onnxruntime"]
    stream = io.StringIO()
    print_report(report, Console(file=stream))
    assert "failed" in stream.getvalue()


def test_with_little_memory_the_models_are_loaded_in_turn(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "available_memory", lambda: 1 << 20)
    report = bench(artifact, engine="onnxruntime", baseline="fp32", output=tmp_path / "r.json", **QUICK)
    assert not report.all_loaded
    assert [run.status for run in report.runs] == ["ok"] * 3
    assert all(len(run.samples_ms) == 10 for run in report.runs)


def test_what_loads_slowly_is_loaded_once_where_others_can_make_room(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    workers: list[EngineWorker] = []

    def noted(outcome: Outcome, workload: Workload, context: int) -> EngineWorker:
        # A longer one is for the check against the reference, and ends with it.
        if context == workload.cached_tokens:
            loaded.append(outcome.candidate.name)
        workers.append(load(outcome, workload, context))
        outcome.load_s = 60.0 if outcome.candidate.engine.name == "deepsparse" else 1.0
        return workers[-1]

    def room_for_three() -> int:
        return 0 if sum(pid_exists(worker.pid) for worker in workers) >= 3 else 1 << 40

    monkeypatch.setattr(pool, "available_memory", room_for_three)
    monkeypatch.setattr(pool, "load", noted)
    options = QUICK | {"repeats": 3}
    report = bench(artifact, engine="deepsparse", baseline="fp32,int8", output=tmp_path / "r.json", **options)
    assert [run.status for run in report.runs] == ["ok"] * 4
    assert not report.all_loaded
    assert [loaded.count(f"deepsparse-{precision}-s70") for precision in ("fp32", "int8")] == [1, 1]
    assert loaded.count("onnxruntime-fp32-dense") > 1


def test_what_is_loaded_for_a_check_alone_gets_room_as_well(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of the reference is longer than the context to be timed, and has a worker of its own."""
    workers: list[EngineWorker] = []
    there: list[int] = []
    spawn = EngineWorker.spawn

    def alive() -> int:
        return sum(pid_exists(worker.pid) for worker in workers)

    def noted(*arguments: Any) -> EngineWorker:
        there.append(alive())
        workers.append(spawn(*arguments))
        return workers[-1]

    monkeypatch.setattr(EngineWorker, "spawn", noted)
    monkeypatch.setattr(pool, "available_memory", lambda: 0 if alive() else 1 << 40)
    report = bench(artifact, engine="onnxruntime", baseline="fp32", output=tmp_path / "r.json", **QUICK)
    assert [run.status for run in report.runs] == ["ok"] * 3
    assert set(there) == {0}
    # Each of the three once for the check alone.
    assert len(there) > 6


def test_weights_that_memory_does_not_hold_are_not_loaded(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {export.precision: export.weight_bytes for export in read_manifest(artifact).exports}
    monkeypatch.setattr(pool, "available_memory", lambda: sizes["fp32"] - 1)
    report = bench(artifact, engine="onnxruntime", baseline="int8", output=tmp_path / "r.json", **QUICK)
    assert {run.name: run.status for run in report.runs} == {
        "onnxruntime-fp32-s70": "failed",
        "onnxruntime-int8-s70": "ok",
        "onnxruntime-int8-dense": "ok",
    }
    assert re.search(r"memory does not hold .* GB are free", report.run("onnxruntime-fp32-s70").reason)


def test_what_memory_has_room_for() -> None:
    frugal, lavish = engine_named("onnxruntime"), engine_named("deepsparse")
    assert has_room(frugal, 10**9, 3 * 10**9)
    assert not has_room(lavish, 10**9, 3 * 10**9)
    assert has_room(lavish, 10**9, 4 * 10**9)


def test_decoding_is_timed_as_deep_as_the_model_reads_where_nothing_is_said(
    artifact: Path, tmp_path: Path
) -> None:
    options = QUICK | {"context": None}
    report = bench(artifact, engine="onnxruntime", baseline="none", output=tmp_path / "r.json", **options)
    # Of the 512 that are usual: prompt and new tokens, and before them a multiple of 16.
    assert [(run.context, run.filled_tokens) for run in report.runs] == [(256, 224)] * 2


def test_no_baseline_means_no_speedup(artifact: Path, tmp_path: Path) -> None:
    report = bench(artifact, engine="onnxruntime", baseline="none", output=tmp_path / "r.json", **QUICK)
    assert report.comparisons == ()
    assert any("no dense baseline" in warning for warning in report.warnings)
    assert report.dense_fp32 is report.best_dense is None


def test_a_report_is_not_overwritten_unless_forced(artifact: Path, tmp_path: Path) -> None:
    for name in ("r.json", "r.md", "r.roofline.svg"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=rf"{name} exists; .* --force"):
            bench(artifact, engine="onnxruntime", output=tmp_path / "r.json", **QUICK)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "r.json").write_text("mine")
    options = QUICK | {"baseline": "none", "repeats": 1}
    report = bench(artifact, engine="onnxruntime", output=tmp_path / "r.json", force=True, **options)
    assert read_report(tmp_path / "r.json") == report


def test_what_is_named_twice_is_measured_once(artifact: Path) -> None:
    planned = plan_runs(artifact, read_manifest(artifact), "onnxruntime, onnxruntime", "int8,fp32,int8")
    assert [candidate.name for candidate in planned] == [
        "onnxruntime-int8-dense",
        "onnxruntime-fp32-dense",
        "onnxruntime-fp32-s70",
        "onnxruntime-int8-s70",
    ]


def test_that_int4_in_deepsparse_is_no_faster_than_int8_is_in_manifest_and_report(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    install("deepsparse")
    exported = exported_artifact(tiny_checkpoint("llama"), tmp_path / "tiny", "int4", "deepsparse", "none")
    slow = "DeepSparse has no 4-bit kernel: this runs at int8 speed, and its head has 8 bits"
    (made,) = read_manifest(exported).exports
    assert slow in made.notes
    report = bench(exported, engine="deepsparse", output=tmp_path / "r.json", **QUICK)
    (run,) = (run for run in report.runs if run.engine == "deepsparse")
    assert (run.name, run.status) == ("deepsparse-int4-s70", "ok")
    assert slow in run.notes
    assert slow in to_markdown(report)
