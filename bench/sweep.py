"""Speed by sparsity of a real shape, without its weights: the paper's speed-up figure on any machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..artifact import Precision
from ..errors import UserError
from ..export.plan import split_baselines
from ..export.reference import Reference, write_reference
from ..export.verify import VerificationError, graph_logits
from ..families import decoder_of
from ..progress import say
from ..storage import naming_full_disk
from .assemble import compare_runs, describe_environment, measure_roofs, run_record
from .caution import warnings
from .engines import engine_named
from .extrapolate import extrapolate
from .machine import describe_machine
from .measure import measure, total_noise
from .outcome import Outcome, Workload, holds_logits
from .outputs import require_suffix, require_writable
from .plan import Candidate
from .points import SCHEMA as POINT_SCHEMA
from .points import Point, append_point, latest, read_points
from .random_model import FAST_BLOCK, RandomModel
from .report import SCHEMA, Environment, Report, Run
from .shapes import shape_config, shape_name
from .sweep_plan import (
    PlannedModel,
    SweepPlan,
    parse_engine,
    parse_precisions,
    parse_sparsities,
    random_workload,
)
from .sweep_report import write_sweep_report
from .worker import TIME_LIMIT_S

# Text to check outputs on: longer than a prompt step of any engine, and some single tokens.
CHECKED, CHECKED_PROMPT = 80, 64
DISK_RESERVE = 1 << 30


def sweep(
    shape: str,
    sparsity: str = "0,0.5,0.6,0.7,0.8,0.9",
    quant: str = "fp32,int8",
    engine: str = "deepsparse",
    baseline: str = "fp32,int8,int4",
    blocks: int | None = None,
    block_size: int = FAST_BLOCK,
    cores: int | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    context: int | None = None,
    repeats: int = 5,
    seed: int = 0,
    time_limit: float = TIME_LIMIT_S,
    output: str | Path | None = None,
    force: bool = False,
) -> list[Point]:
    """Measure a model of the shape `shape` with random weights at each sparsity in each precision.

    `shape` is a built-in name (llama2-7b, tinyllama-1.1b, ...) or a folder with a config.json. The sparse
    model runs in `engine`; beside each point, in the same rounds, run the dense `baseline` models in ONNX
    Runtime, or in llama.cpp where it is named (llamacpp-int8). With `blocks`, that many decoder blocks and
    half as many are measured and the whole model is extrapolated; without, so are only the models that
    memory does not hold. `context` is the depth at which decoding is timed: 512 unless told, or as many
    positions as the shape has. `block_size` weights share a scale in ONNX Runtime's int8 and int4; more are
    faster. Every graph is held against torch in fp32 before it is timed, at the beginning of the text and at
    the timed depth. An engine that gives no answer for `time_limit` seconds has failed, and its point is
    measured again by the next sweep. Graphs are written beside the output and deleted.

    Each finished point is appended to `output` (sweep-<shape>.jsonl unless told), and points that are
    there already are not measured again, unless `force` starts anew; .md, .csv, .png and .svg are written
    beside it after each. Raises UserError for what cannot be measured as asked, before anything is.
    """
    path = Path(output) if output else Path(f"sweep-{shape_name(shape)}.jsonl")
    # By another name, one of the reports might take the place of the points.
    require_suffix(path, ".jsonl")
    require_writable(path.parent)
    plan = SweepPlan(
        shape=shape,
        sparsities=parse_sparsities(sparsity),
        quants=parse_precisions(quant, "--quant"),
        engine=parse_engine(engine),
        baselines=split_baselines(baseline),
        blocks=blocks,
        block_size=block_size,
        seed=seed,
        workload=random_workload(shape, cores, prompt_tokens, new_tokens, context, repeats, seed, time_limit),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        return _run(plan, path, force)


def _run(plan: SweepPlan, path: Path, force: bool) -> list[Point]:
    done = [] if force else read_points(path)
    _require_same_machine(path, done)
    _name_others(path, done, plan.settings)
    finished = {(p.quant, p.sparsity) for p in latest(done, plan.settings) if p.is_whole}
    todo = [
        (quant, sparsity)
        for sparsity in plan.sparsities
        for quant in plan.quants
        if (quant, sparsity) not in finished
    ]
    if not todo:
        return _report(plan, path)
    with _Graphs(plan, path) as graphs:
        for number, (quant, sparsity) in enumerate(todo, 1):
            say(f"Point {number} of {len(todo)}: {plan.shape}, sparsity {sparsity:g}, {quant}")
            point = _measure_point(plan, graphs, quant, sparsity)
            if force and number == 1:
                # Not before: until there is something new, what is there is all there is.
                path.unlink(missing_ok=True)
            append_point(path, point)
            # After each: a sweep of hours may be stopped.
            points = _report(plan, path)
    return points


def _report(plan: SweepPlan, path: Path) -> list[Point]:
    """The finished points of the sweep, of which reports are written beside them."""
    points = latest(read_points(path), plan.settings)
    write_sweep_report(points, path)
    return points


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another sweep is writing {path}; wait for it, or give another --output") from None
    try:
        yield
    finally:
        lock.release()


def _require_same_machine(path: Path, points: Sequence[Point]) -> None:
    cpu = describe_machine().cpu
    for point in points:
        if point.report.environment.cpu != cpu:
            measured = point.report.environment.cpu
            raise UserError(f"{path} was measured on {measured}, and this is {cpu}; give another --output")


def _name_others(path: Path, points: Sequence[Point], settings: Mapping[str, Any]) -> None:
    """Say which points of the file are not of this sweep."""
    others = [point for point in points if point.settings != settings]
    differing = dict.fromkeys(
        f"{name} {point.settings.get(name)}"
        for point in others
        for name, value in settings.items()
        if point.settings.get(name) != value
    )
    if others:
        say(
            f"{path} has points of other settings too ({', '.join(differing)}): "
            "they are kept, and are no part of this sweep"
        )


class _Graphs:
    """Graphs of random models in a folder beside the output, which is gone in the end."""

    def __init__(self, plan: SweepPlan, path: Path) -> None:
        self._plan = plan
        self._folder = path.with_name(f".{path.name}.graphs")
        self._made: dict[str, Candidate] = {}
        self._torch: dict[str, _OfTorch] = {}

    def __enter__(self) -> _Graphs:
        # What a killed sweep has left would only take room.
        shutil.rmtree(self._folder, ignore_errors=True)
        need, free = self._plan.disk_bytes() + DISK_RESERVE, shutil.disk_usage(self._folder.parent).free
        if need > free:
            raise UserError(
                f"the graphs of this sweep take {need / 1e9:.1f} GB in {self._folder.parent.resolve()} and "
                f"{free / 1e9:.1f} GB are free; free some, give --output elsewhere, or fewer --blocks"
            )
        self._folder.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def candidates(self, model: PlannedModel) -> list[Candidate]:
        """What to measure of a model; its graphs are written unless they are there."""
        for count in model.counts:
            if model.measured_name(count) not in self._made:
                self._made[model.measured_name(count)] = self._make(model, count)
        return [self._made[model.measured_name(count)] for count in model.counts]

    def drop(self, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            del self._made[candidate.name]
            shutil.rmtree(candidate.reference)

    def _make(self, model: PlannedModel, count: int) -> Candidate:
        name = model.measured_name(count)
        folder, random = self._folder / name, self._plan.model(count, model.sparsity)
        with naming_full_disk(folder):
            written = random.write(folder, model.engine, model.precision)
            self._write_reference(folder, random, written.model, model.precision)
        return Candidate(
            name=name,
            engine=engine_named(model.engine),
            precision=model.precision,
            dense=model.dense,
            sparsity=model.sparsity,
            model=written.model,
            reference=folder,
            weight_bytes=written.weight_bytes,
            weights=_weights(random),
            block_size=random.grid_block(model.engine, model.precision),
            notes=written.notes,
        )

    def _write_reference(self, folder: Path, random: RandomModel, graph: Path, precision: Precision) -> None:
        reference = self._of_torch(random).beginning
        if precision != "fp32" and graph.suffix == ".onnx":
            try:
                logits = graph_logits(graph, reference.ids, reference.prompt)
                reference = replace(reference, graph_logits=logits)
            except VerificationError as error:
                # Such as a lack of memory; outputs are then held against torch alone.
                say(f"No logits of ONNX Runtime on the same graph: {error}")
        write_reference(folder, reference)

    def torch_at_depth(self, candidates: Sequence[Candidate]) -> dict[str, np.ndarray]:
        """What torch says at the timed depth of those candidates, by their weights."""
        found = {candidate.weights: self._torch[candidate.weights].at_depth for candidate in candidates}
        return {weights: logits for weights, logits in found.items() if logits is not None}

    def _of_torch(self, random: RandomModel) -> _OfTorch:
        """What torch says, which is the same for all graphs of a model."""
        weights = _weights(random)
        if weights not in self._torch:
            self._torch[weights] = _ask_torch(random, self._folder / weights, self._plan.workload)
        return self._torch[weights]


@dataclass(frozen=True)
class _OfTorch:
    """Logits of a model in fp32 at the beginning of the timed text, and float32 [positions, vocabulary] at
    the timed depth (None: memory has no room for the logits of the whole text)."""

    beginning: Reference
    at_depth: np.ndarray | None


def _weights(random: RandomModel) -> str:
    return f"{random.decoder.blocks} blocks, {random.sparsity:g} sparse"


def _ask_torch(random: RandomModel, folder: Path, workload: Workload) -> _OfTorch:
    """Both in one pass over the text, which every run makes in each warm-up and each round as well."""
    text = np.concatenate([workload.ids, workload.following])
    checked = min(CHECKED, len(text))
    prompt = min(CHECKED_PROMPT, checked - 1)
    if not holds_logits(len(text), random.decoder.vocabulary):
        return _OfTorch(random.reference(folder, text[:checked], prompt), None)
    first = min(prompt, len(workload.ids))
    logits = random.reference(folder, text, first).logits
    beginning = Reference(text[:checked], prompt, logits[prompt - first : checked - first + 1].copy())
    return _OfTorch(beginning, logits[len(workload.ids) - first :].copy())


def _measure_point(plan: SweepPlan, graphs: _Graphs, quant: Precision, sparsity: float) -> Point:
    dense, sparse = plan.baseline_models(), plan.sparse_model(quant, sparsity)
    baselines = [candidate for model in dense for candidate in graphs.candidates(model)]
    own = graphs.candidates(sparse)
    roofs = measure_roofs(plan.workload.cores)
    outcomes = [Outcome(candidate) for candidate in (*baselines, *own)]
    workload = replace(plan.workload, torch_at_depth=graphs.torch_at_depth([*baselines, *own]))
    together = measure(outcomes, workload)
    environment = describe_environment(roofs, outcomes)
    measured = [
        _measured_run(plan, model, count, outcome, environment)
        for (model, count), outcome in zip(
            [(model, count) for model in (*dense, sparse) for count in model.counts], outcomes, strict=True
        )
    ]
    graphs.drop(own)
    runs = tuple(_whole_run(plan, model, measured, environment) for model in (*dense, sparse))
    limited = tuple(run for run in measured if run.blocks is not None)
    noise = total_noise(outcomes).record()
    report = Report(
        schema=SCHEMA,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dlp_deploy=version("dlp-deploy"),
        artifact=f"{shape_name(plan.shape)}, {quant}, sparsity {sparsity:g}, random weights",
        model=shape_name(plan.shape),
        command=plan.settings,
        environment=environment,
        evaluation=None,
        all_loaded=together,
        runs=runs,
        comparisons=compare_runs(runs),
        noise=noise,
        warnings=warnings(runs, noise, environment, limited, together),
    )
    return Point(
        schema=POINT_SCHEMA,
        shape=plan.shape,
        quant=quant,
        sparsity=sparsity,
        settings=plan.settings,
        measured=limited,
        report=report,
    )


def _measured_run(
    plan: SweepPlan, model: PlannedModel, count: int, outcome: Outcome, environment: Environment
) -> Run:
    decoder = decoder_of(shape_config(plan.shape, count))
    run = run_record(outcome, plan.workload, decoder, environment)
    return run if len(model.counts) == 1 else run.model_copy(update={"blocks": count})


def _whole_run(
    plan: SweepPlan, model: PlannedModel, measured: Sequence[Run], environment: Environment
) -> Run:
    found = {run.name: run for run in measured}
    runs = [found[model.measured_name(count)] for count in model.counts]
    if len(runs) == 1:
        return runs[0]
    small, large = runs
    return extrapolate(small, large, model.name, plan.total, environment)
