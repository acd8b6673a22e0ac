"""One bench from request to report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..artifact import CHECKPOINT, Manifest, check_files, newest_artifact, read_manifest
from ..blocks import logits_of
from ..calibration import TokenWindows, evaluation_windows
from ..errors import UserError
from ..export.loadable import require_loadable
from ..families import Outline
from ..models import ModelFiles, load_config, load_tokenizer
from ..outline import outline_of
from ..progress import say
from ..storage import refuse_existing, write_text
from . import REPORT
from .assemble import Roofs, compare_runs, describe_environment, measure_roofs, run_record
from .caution import warnings
from .cores import choose_cores
from .machine import busy_share, require_avx2
from .markdown import to_markdown
from .measure import measure, measure_perplexity, total_noise
from .outcome import (
    Outcome,
    Workload,
    check_lengths,
    check_time_limit,
    holds_logits,
    text_lengths,
    usual_context,
)
from .outputs import require_suffix, require_writable
from .plan import Candidate, plan_runs
from .plot import overview, roofline_figure, save
from .report import SCHEMA, Evaluated, Report, to_json
from .table_csv import to_csv

# Other work on the cores beyond this is worth a word before minutes are spent.
BUSY = 0.1
_PATHS = ("artifact", "output", "force")
# What is written beside each other, by what takes the place of .json.
FORMS = (".json", ".md", ".csv", ".png", ".svg", ".roofline.png", ".roofline.svg")


@dataclass(frozen=True)
class Request:
    """The arguments of `bench`."""

    artifact: Path | None
    engine: str
    cores: int | None
    baseline: str | None
    prompt_tokens: int
    new_tokens: int
    context: int | None
    repeats: int
    eval_data: str
    eval_windows: int
    eval_tokens: int
    time_limit: float
    output: Path | None
    force: bool


def run_bench(request: Request) -> Report:
    """Check the request, measure, and write the report. Raises UserError before anything is measured.

    What stops it later, Ctrl-C too, is raised when the report of what was finished by then is written.
    """
    artifact = request.artifact or newest_artifact()
    manifest = read_manifest(artifact)
    output = request.output or artifact.parent / f"{artifact.name}.bench" / REPORT
    _check_output(output, request.force)
    require_avx2()
    cores = choose_cores(request.cores)
    candidates = plan_runs(artifact, manifest, request.engine, request.baseline)
    _check_candidates(artifact, manifest, candidates)
    files = ModelFiles(manifest.source.name, str(artifact), artifact / CHECKPOINT)
    decoder = outline_of(load_config(files))
    workload, windows = _workload(request, files, decoder, cores)
    require_writable(output.parent)
    say(f"Measuring {', '.join(candidate.name for candidate in candidates)}")
    if (busy := busy_share(cores)) > BUSY:
        say(f"The cores to be measured on are already {busy:.0%} busy: figures will be less certain")
    bench = _Bench(request, artifact.name, manifest.source.name, decoder, workload, windows)
    outcomes, roofs = [Outcome(candidate) for candidate in candidates], measure_roofs(cores)
    try:
        workload = bench.workload = _with_torch(workload, files, decoder, candidates)
        bench.all_loaded = measure(outcomes, workload)
        if windows is not None:
            measure_perplexity(outcomes, windows.ids.numpy(), workload)
    except BaseException as error:
        _keep_finished(bench, outcomes, roofs, output, error)
        raise
    report = bench.report(outcomes, roofs)
    write_report(report, output)
    return report


def _keep_finished(
    bench: _Bench, outcomes: Sequence[Outcome], roofs: Roofs, output: Path, error: BaseException
) -> None:
    """Write the report of the rounds that were finished, if there are any."""
    if not any(outcome.generations for outcome in outcomes):
        return
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        why = str(error) or "Ctrl-C"
    for outcome in outcomes:
        if not outcome.ended and len(outcome.generations) < bench.workload.repeats:
            outcome.fail(f"stopped by {why}")
    say(f"Stopped by {why}; writing the report of what is finished")
    write_report(bench.report(outcomes, roofs, stopped=why), output)


def write_report(report: Report, path: Path) -> None:
    """Write report.json at `path`, and .md, .csv and pictures (.png and .svg) beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # First: all else can be made of it again.
    write_text(path, to_json(report))
    say(f"Report: {path}; .md, .csv, .png and .svg follow beside it")
    write_text(path.with_suffix(".md"), to_markdown(report))
    write_text(path.with_suffix(".csv"), to_csv(report))
    save(overview(report), path.with_suffix(".png"))
    save(roofline_figure(report), path.with_suffix(".roofline.png"))


def _check_output(output: Path, force: bool) -> None:
    require_suffix(output, ".json")
    for form in FORMS:
        refuse_existing(output.with_suffix(form), force, file=True)


def _check_candidates(artifact: Path, manifest: Manifest, candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise UserError(f"nothing to measure in {artifact}: no engine and no baseline")
    read = {candidate.reference.relative_to(artifact).as_posix() for candidate in candidates}
    read |= {CHECKPOINT for candidate in candidates if candidate.engine.reads == CHECKPOINT}
    check_files(artifact, manifest, [f"{folder}/" for folder in sorted(read)])
    for candidate in candidates:
        require_loadable(candidate.model, candidate.engine.name)


def _workload(
    request: Request, files: ModelFiles, decoder: Outline, cores: tuple[int, ...]
) -> tuple[Workload, TokenWindows | None]:
    """The tokens to time on, and those for the perplexity; both are real text."""
    usual = usual_context(request.prompt_tokens, request.new_tokens, decoder.max_positions)
    context = usual if request.context is None else request.context
    check_lengths(request.prompt_tokens, request.new_tokens, request.repeats, context, decoder.max_positions)
    check_time_limit(request.time_limit)
    tokenizer = load_tokenizer(files)
    length, after = text_lengths(request.prompt_tokens, request.new_tokens, context)
    text = np.ascontiguousarray(
        evaluation_windows(request.eval_data, tokenizer, 1, length + after).ids[0].numpy()
    )
    workload = Workload(
        cores=cores,
        ids=text[:length],
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        context=context,
        repeats=request.repeats,
        following=text[length:],
        time_limit_s=request.time_limit,
    )
    if not request.eval_windows:
        return workload, None
    length = min(request.eval_tokens, decoder.max_positions)
    return workload, evaluation_windows(request.eval_data, tokenizer, request.eval_windows, length)


def _with_torch(
    workload: Workload, files: ModelFiles, decoder: Outline, candidates: Sequence[Candidate]
) -> Workload:
    """The workload with what torch says of the pruned model at the timed depth, if there is room for it."""
    ids = np.concatenate([workload.ids, workload.following])
    pruned = {candidate.weights for candidate in candidates if not candidate.dense}
    if not pruned or not holds_logits(len(ids), decoder.vocabulary):
        return workload
    say("Asking torch for the logits at the timed depth")
    (logits,) = logits_of(files, torch.from_numpy(ids)[None])
    at_depth = logits[len(workload.ids) - 1 :].numpy()
    return replace(workload, torch_at_depth=dict.fromkeys(pruned, at_depth))


@dataclass
class _Bench:
    """What a report says besides what was measured."""

    request: Request
    artifact: str
    model: str
    decoder: Outline
    workload: Workload
    windows: TokenWindows | None
    all_loaded: bool = False

    def report(self, outcomes: Sequence[Outcome], roofs: Roofs, stopped: str = "") -> Report:
        """The report of `outcomes`; `stopped` says what ended the bench early."""
        environment = describe_environment(roofs, outcomes, again=not stopped)
        runs = tuple(run_record(outcome, self.workload, self.decoder, environment) for outcome in outcomes)
        noise = total_noise(outcomes).record()
        early = (f"the bench was stopped by {stopped}: what it had not finished is missing",)
        # Of a bench that was stopped it is not known whether all were loaded.
        doubts = warnings(runs, noise, environment, all_loaded=self.all_loaded or bool(stopped))
        return Report(
            schema=SCHEMA,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            dlp_deploy=version("dlp-deploy"),
            artifact=self.artifact,
            model=self.model,
            command=_command(self.request, self.workload),
            environment=environment,
            evaluation=_evaluated(self.request, self.windows),
            all_loaded=self.all_loaded,
            runs=runs,
            comparisons=compare_runs(runs),
            noise=noise,
            warnings=(*(early if stopped else ()), *doubts),
        )


def _command(request: Request, workload: Workload) -> dict[str, Any]:
    """The arguments of this bench but its paths, with what was chosen for those left out."""
    arguments = {name: value for name, value in asdict(request).items() if name not in _PATHS}
    return {**arguments, "cores": len(workload.cores), "context": workload.context}


def _evaluated(request: Request, windows: TokenWindows | None) -> Evaluated | None:
    if windows is None:
        return None
    count, length = windows.ids.shape
    return Evaluated(data=request.eval_data, windows=count, tokens_per_window=length, sha256=windows.sha256)
