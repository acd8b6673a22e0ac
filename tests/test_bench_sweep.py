"""Sweeps over a tiny shape in the real engines: what is measured, carried on, resumed and refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.bench import pool
from dlp_deploy.bench import sweep as sweeps
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.points import Point, read_points
from dlp_deploy.bench.random_model import RandomModel
from dlp_deploy.bench.shapes import shape_config
from dlp_deploy.bench.sweep import sweep
from dlp_deploy.bench.sweep_plan import SweepPlan, block_counts, random_workload
from dlp_deploy.bench.worker import EngineWorker, Generation
from dlp_deploy.errors import UserError
from dlp_deploy.families import decoder_of

from .limits import short_limit

QUICK: dict[str, Any] = {"cores": 1, "prompt_tokens": 20, "new_tokens": 6, "context": 26, "repeats": 2}
FAULTY = """
import os, time
import numpy as np
from engine_workers import onnxruntime

class Session(onnxruntime.Session):
    texts = 0

    def load(self, model, *lengths, **named):
        self.fault = os.environ["FAULT"] if "s75" in model else ""
        super().load(model, *lengths, **named)

    def restart(self):
        super().restart()
        self.texts += 1
        # The texts are: the beginning, the check at depth, two warm-ups, and the rounds.
        if self.fault == "hangs" and self.texts == 6:
            os.write(2, b"error: waits for a lock\\n")
            time.sleep(600)

    def extend(self, ids):
        logits = super().extend(ids)
        if self.fault == "errs at depth" and self._cache.done > 100:
            return np.roll(logits, 1)
        return logits
"""


@pytest.fixture(scope="module")
def shape(tiny_checkpoint: Callable[[str], Path]) -> str:
    return str(tiny_checkpoint("llama"))


def milliseconds_of(engine: str, blocks: int, text: int) -> float:
    """Milliseconds per token of the `text`-th text that a worker reads, from zero on."""
    return (2 + {"onnxruntime": 4, "deepsparse": 1}[engine] * blocks) * (1 + 0.01 * text)


@contextmanager
def clock_of_blocks() -> Iterator[None]:
    """Engines really decode, by a clock that counts blocks: what is carried on is then known to the digit,
    however noisy the machine is."""
    load, generate = EngineWorker.load, EngineWorker.generate
    blocks: dict[int, int] = {}
    texts: Counter[int] = Counter()

    def noted(self: EngineWorker, model: Path, *arguments: Any, **named: Any) -> float:
        blocks[self.pid] = int(model.parent.name.split("-")[-2])
        return load(self, model, *arguments, **named)

    def timed(self: EngineWorker, ids: np.ndarray, new_tokens: int) -> Generation:
        made = generate(self, ids, new_tokens)
        took = milliseconds_of(self.engine.name, blocks[self.pid], texts[self.pid])
        texts[self.pid] += 1
        return replace(made, ttft_ms=took, samples_ms=(took,) * len(made.samples_ms))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EngineWorker, "load", noted)
        patched.setattr(EngineWorker, "generate", timed)
        yield


@pytest.fixture(scope="module")
def swept(shape: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Point]:
    install("deepsparse")
    output = tmp_path_factory.mktemp("sweep") / "s.jsonl"
    options: dict[str, Any] = {
        "cores": 1,
        "prompt_tokens": 20,
        "new_tokens": 24,
        "context": 110,
        "repeats": 3,
    }
    options |= {"quant": "int8", "baseline": "fp32", "blocks": 2}
    with clock_of_blocks():
        (point,) = sweep(shape, sparsity="0.8", output=output, **options)
    return output, point


def test_a_point_is_carried_on_to_the_whole_model(
    swept: tuple[Path, Point], shape: str, tmp_path: Path
) -> None:
    _, point = swept
    assert [run.name for run in point.measured] == [
        "onnxruntime-fp32-dense-1-blocks",
        "onnxruntime-fp32-dense-2-blocks",
        "deepsparse-int8-s80-1-blocks",
        "deepsparse-int8-s80-2-blocks",
    ]
    assert [run.name for run in point.report.runs] == ["onnxruntime-fp32-dense", "deepsparse-int8-s80"]
    for run, small, large in zip(point.report.runs, point.measured[::2], point.measured[1::2], strict=True):
        assert (run.status, run.reason) == ("ok", "")
        assert run.extrapolated_from == (small.name, large.name)
        # Behind two texts to warm up.
        expected = [milliseconds_of(run.engine, 3, text) for text in (2, 3, 4)]
        assert run.samples_ms == pytest.approx(expected)
        assert small.output_check is not None
        assert small.output_check.positions == 17
        assert small.tokens_sha256 is not None
        for each in (small, large):
            check = each.depth_check
            assert check is not None
            # Of 66 positions before the prompt, a multiple of 16 is filled.
            assert (check.reference, check.depth, check.positions) == ("torch", 84, 9)
        # No engine has run the whole model.
        assert (run.output_check, run.depth_check, run.tokens_sha256) == (None, None, None)
        assert run.roofline is not None
    # Bytes are not noisy: those of the whole graph are found exactly.
    whole = RandomModel(shape_config(shape), 0.8, 0).write(tmp_path, "deepsparse", "int8")
    assert point.sparse.weight_bytes == whole.weight_bytes
    comparison = point.report.speedup_over("deepsparse-int8-s80", "onnxruntime-fp32-dense")
    assert comparison is not None
    assert (comparison.speedup, *comparison.ci95) == pytest.approx(((2 + 3 * 4) / (2 + 3 * 1),) * 3)


def test_a_sweep_leaves_its_reports_and_no_graphs(swept: tuple[Path, Point]) -> None:
    output, point = swept
    assert sorted(path.name for path in output.parent.iterdir()) == [
        ".s.jsonl.lock",
        "s.csv",
        "s.jsonl",
        "s.md",
        "s.png",
        "s.svg",
    ]
    text = output.with_suffix(".md").read_text()
    assert "| int8* | 80% |" in text
    kinds = "onnxruntime-fp32-dense, sparse deepsparse-int8"
    assert f"extrapolated from 1 and 2 of 3 decoder blocks ({kinds})" in text
    assert "- sparse deepsparse-int8: weights: 8 bit, one scale per channel, rounded to nearest" in text
    assert "4 of 4 timed runs were held against torch" in text
    assert "and 4 at the timed depth too" in text
    (row,) = csv.DictReader(io.StringIO(output.with_suffix(".csv").read_text()))
    assert row["extrapolated"] == "True"
    assert float(row["speedup"]) == point.report.comparisons[0].speedup
    assert read_points(output) == [point]


def test_a_sweep_goes_on_where_it_was_killed(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.jsonl"
    options = QUICK | {"engine": "onnxruntime", "quant": "fp32", "baseline": "fp32", "output": output}
    sweep(shape, sparsity="0.5", **options)
    first = output.read_bytes()
    output.write_bytes(first + b'{"schema": 1, "shape": "ti')
    (tmp_path / ".s.jsonl.graphs").mkdir()
    points = sweep(shape, sparsity="0.5,0.75", **options)
    assert [point.sparsity for point in points] == [0.5, 0.75]
    assert all(run.extrapolated_from == () for point in points for run in point.report.runs)
    assert output.read_bytes().startswith(first)
    again = output.read_bytes()
    assert sweep(shape, sparsity="0.75,0.5", **options) == points
    assert output.read_bytes() == again
    assert not (tmp_path / ".s.jsonl.graphs").exists()

    stored = json.loads(first)
    stored["settings"]["context"] = 20
    output.write_bytes(json.dumps(stored).encode() + b"\n" + again)
    assert sweep(shape, sparsity="0.75,0.5", **options) == points
    assert "has points of other settings too (context 20)" in capsys.readouterr().err

    stored["report"]["environment"]["cpu"] = "another processor"
    output.write_text(json.dumps(stored) + "\n")
    with pytest.raises(UserError, match="was measured on another processor"):
        sweep(shape, sparsity="0.5", **options)
    output.write_text('{"schema": 1}\n')
    with pytest.raises(UserError, match="line 1 is no point of a sweep: shape"):
        sweep(shape, sparsity="0.5", **options)


def test_of_a_sweep_that_is_stopped_there_are_reports(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, path = sweeps.measure, tmp_path / "s.jsonl"
    turns = iter([False, True])

    def stopped_in_the_second(*arguments: Any) -> bool:
        if next(turns):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(sweeps, "measure", stopped_in_the_second)
    options = QUICK | {"engine": "onnxruntime", "quant": "fp32", "baseline": "none", "output": path}
    with pytest.raises(KeyboardInterrupt):
        sweep(shape, sparsity="0.5,0.75", **options)
    text = path.with_suffix(".md").read_text()
    assert "| fp32 | 50% |" in text
    assert "| fp32 | 75% |" not in text
    assert {"s.csv", "s.png", "s.svg"} <= {each.name for each in tmp_path.iterdir()}


def test_a_sweep_that_starts_anew_keeps_what_is_there_until_there_is_more(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QUICK | {"engine": "onnxruntime", "quant": "fp32", "baseline": "none", "sparsity": "0.5"}
    path = tmp_path / "s.jsonl"
    sweep(shape, output=path, **options)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        usage = namedtuple("usage", ("total", "used", "free"))
        patched.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**6))
        with pytest.raises(UserError, match="are free; free some"):
            sweep(shape, output=path, force=True, **options)
    assert path.read_bytes() == before
    (anew,) = sweep(shape, output=path, force=True, **options)
    assert read_points(path) == [anew]
    assert path.read_bytes() != before


def test_a_folder_whose_config_has_changed_is_another_shape(shape: str, tmp_path: Path) -> None:
    def planned(folder: Path) -> dict[str, Any]:
        workload = random_workload(str(folder), 1, 20, 6, 26, 2, 0)
        return SweepPlan(str(folder), (0.5,), ("fp32",), "onnxruntime", (), None, 128, 0, workload).settings

    own = Path(shutil.copytree(shape, tmp_path / "own"))
    before = planned(own)
    assert planned(own) == before
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(
        json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]})
    )
    assert planned(own) != before


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`faulty(fault)`: the engine is ONNX Runtime's own worker with that fault at 75 %."""
    (tmp_path / "faulty.py").write_text(FAULTY)

    def faulty(fault: str) -> None:
        monkeypatch.setenv("FAULT", fault)
        engine = replace(engine_named("onnxruntime"), worker=str(tmp_path / "faulty.py"))
        monkeypatch.setattr(sweeps, "engine_named", lambda name: engine)
        monkeypatch.setattr(pool, "WARM_UPS", 2)

    return faulty


def test_wrong_output_at_the_timed_depth_of_a_sweep_is_not_timed(
    shape: str, tmp_path: Path, faulty: Callable[[str], None]
) -> None:
    faulty("errs at depth")
    output = tmp_path / "s.jsonl"
    options = QUICK | {"context": 150, "engine": "onnxruntime", "output": output, "baseline": "none"}
    for quant in ("fp32", "int8"):
        right, wrong = sweep(shape, sparsity="0.5,0.75", quant=quant, **options)[-2:]
        assert (right.sparse.status, wrong.sparse.status) == ("ok", "wrong output")
        assert "at the timed depth against torch" in wrong.sparse.reason
        assert wrong.sparse.tpot_ms is None


def test_a_run_that_hangs_in_a_sweep_is_ended_and_measured_again(
    shape: str, tmp_path: Path, faulty: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "s.jsonl"
    options = QUICK | {"engine": "onnxruntime", "quant": "fp32", "baseline": "fp32", "output": output}
    options |= {"sparsity": "0.5,0.75"}
    faulty("hangs")
    with monkeypatch.context() as patched:
        # Behind two warm-ups and the first round.
        short_limit(patched, "s75", text=4, seconds=3)
        whole, ended = sweep(shape, time_limit=1800, **options)
    assert (whole.is_whole, ended.is_whole) == (True, False)
    said = "gave no answer for 3 s and was ended; its last words: error: waits for a lock"
    assert said in ended.sparse.reason
    assert [len(run.samples) for run in ended.report.runs] == [2, 1]
    # Another limit is the same sweep: only the point that is not whole is measured again.
    faulty("none")
    again = sweep(shape, time_limit=600, **options)
    assert again[0] == whole
    assert again[1].is_whole
    assert len(read_points(output)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "tinyllama-2b"}, "nearest are: tinyllama-1.1b"),
        ({"sparsity": "0.5,1"}, r"--sparsity 0.5,1: give numbers in \[0, 1\)"),
        ({"sparsity": "much"}, "--sparsity much"),
        ({"quant": "int7"}, "--quant int7"),
        ({"engine": "torch"}, "--engine torch takes no graphs"),
        ({"block_size": 100}, "--block-size 100: ONNX Runtime takes 16, 32"),
        ({"blocks": 1}, "--blocks 1: extrapolation needs 2 or more"),
        ({"context": 25}, "--context 25 is too short"),
        ({"cores": 1000}, "--cores 1000: this machine has"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"time_limit": float("inf")}, "--time-limit inf: give seconds"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    shape: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    arguments = {"shape": shape, "engine": "onnxruntime", "output": tmp_path / "s.jsonl", **QUICK, **options}
    with pytest.raises(UserError, match=message):
        sweep(**arguments)
    assert not (tmp_path / "s.jsonl").exists()


def test_a_folder_is_called_by_its_name_from_inside_too(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(shape, tmp_path / "own-shape")
    monkeypatch.chdir(own)
    (made,) = sweep(".", sparsity="0.5", quant="fp32", engine="onnxruntime", baseline="none", **QUICK)
    assert (own / "sweep-own-shape.jsonl").is_file()
    assert made.report.model == "own-shape"


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 2 * 10**9))
    with pytest.raises(UserError, match=r"take \d+\.\d GB in .* and 2.0 GB are free"):
        sweep("tinyllama-1.1b", engine="onnxruntime", output=tmp_path / "s.jsonl", **QUICK)


@given(st.integers(2, 100), st.integers(2, 100))
@settings(max_examples=50, deadline=None)
def test_a_limited_model_is_measured_at_two_sizes(limit: int, total: int) -> None:
    counts = block_counts(limit, total)
    assert counts == ((total,) if limit >= total else (limit // 2, limit))
    assert 0 < counts[0] <= counts[-1] <= total
    assert block_counts(None, total) == (total,)


def test_decoding_is_timed_behind_512_tokens_or_as_many_as_there_are(shape: str) -> None:
    def context(of: str, prompt: int = 64, given: int | None = None) -> int:
        return random_workload(of, 1, prompt, 32, given, 5, 0).context

    assert context("llama2-7b") == 512
    assert context("llama2-7b", prompt=600) == 632
    assert context("llama2-7b", given=96) == 96
    assert context(shape) == decoder_of(shape_config(shape)).max_positions < 512
    with pytest.raises(UserError, match="--context 0 is too short"):
        context("llama2-7b", given=0)


def test_what_memory_does_not_hold_is_planned_with_fewer_blocks() -> None:
    workload = random_workload("llama2-7b", 1, 64, 32, 512, 5, 0)
    plan = SweepPlan(
        "llama2-7b", (0.7,), ("int8",), "onnxruntime", ("fp32", "int4"), None, 128, 0, workload, 24 << 30
    )
    assert [model.counts for model in plan.baseline_models()] == [(8, 16), (32,)]
    assert plan.sparse_model("int8", 0.7).counts == (32,)
    # The figures of the whole models, to the gigabyte: 16 + 8 blocks in fp32, all in int4 and in int8.
    assert plan.disk_bytes() == pytest.approx((22 + 4 + 7) * 1e9, rel=0.1)
