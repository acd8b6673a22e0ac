"""One bench from request to report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import CHECKPOINT, Manifest, check_files, newest_artifact, read_manifest
from ..calibration import TokenWindows, evaluation_windows
from ..errors import UserError
from ..families import Outline
from ..models import ModelFiles, load_config, load_tokenizer
from ..outline import outline_of
from ..progress import say
from ..storage import refuse_existing, write_text
from . import REPORT
from .assemble import compare_runs, describe_environment, noise_record, run_record, warnings
from .machine import busy_share, choose_cores, require_avx2
from .measure import Noise, Outcome, Workload, check_lengths, measure, measure_perplexity
from .plan import Candidate, plan_runs
from .plot import overview, roofline_figure, save
from .present import to_csv, to_markdown
from .report import Evaluated, Report, to_json

# Other work on the cores beyond this is worth a word before minutes are spent.
BUSY = 0.1
_PATHS = ("artifact", "output", "force")


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
    output: Path | None
    force: bool


def run_bench(request: Request) -> Report:
    """Check the request, measure, and write the report. Raises UserError before anything is measured."""
    artifact = request.artifact or newest_artifact()
    manifest = read_manifest(artifact)
    output = request.output or artifact.parent / f"{artifact.name}.bench" / REPORT
    refuse_existing(output, request.force)
    require_avx2()
    cores = choose_cores(request.cores)
    candidates = plan_runs(artifact, manifest, request.engine, request.baseline)
    _check_candidates(artifact, manifest, candidates)
    files = ModelFiles(manifest.source.name, str(artifact), artifact / CHECKPOINT)
    decoder = outline_of(load_config(files))
    workload, windows = _workload(request, files, decoder, cores)
    say(f"Measuring {', '.join(candidate.name for candidate in candidates)}")
    if (busy := busy_share(cores)) > BUSY:
        say(f"The cores to be measured on are already {busy:.0%} busy: figures will be less certain")
    outcomes, noise, together = measure(candidates, workload)
    if windows is not None:
        measure_perplexity(outcomes, windows.ids.numpy(), cores)
    report = _report(request, artifact, manifest, decoder, workload, windows, outcomes, noise, together)
    write_report(report, output)
    return report


def write_report(report: Report, path: Path) -> None:
    """Write report.json at `path`, and .md, .csv and pictures (.png and .svg) beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path.with_suffix(".md"), to_markdown(report))
    write_text(path.with_suffix(".csv"), to_csv(report))
    save(overview(report), path.with_suffix(".png"))
    save(roofline_figure(report), path.with_suffix(".roofline.png"))
    # Last: where report.json is, the others are too.
    write_text(path.with_suffix(".json"), to_json(report))
    say(f"Report: {path.with_suffix('.json')}, and .md, .csv, .png and .svg beside it")


def _check_candidates(artifact: Path, manifest: Manifest, candidates: Sequence[Candidate]) -> None:
    if not candidates:
        raise UserError(f"nothing to measure in {artifact}: no engine and no baseline")
    read = {candidate.reference.relative_to(artifact).as_posix() for candidate in candidates}
    read |= {CHECKPOINT for candidate in candidates if candidate.engine.reads == CHECKPOINT}
    check_files(artifact, manifest, [f"{folder}/" for folder in sorted(read)])


def _workload(
    request: Request, files: ModelFiles, decoder: Outline, cores: tuple[int, ...]
) -> tuple[Workload, TokenWindows | None]:
    """The tokens to time on, and those for the perplexity; both are real text."""
    context = request.context or request.prompt_tokens + request.new_tokens
    check_lengths(request.prompt_tokens, request.new_tokens, request.repeats, context, decoder.max_positions)
    tokenizer = load_tokenizer(files)
    text = evaluation_windows(request.eval_data, tokenizer, 1, context - request.new_tokens)
    workload = Workload(
        cores=cores,
        ids=np.ascontiguousarray(text.ids[0].numpy()),
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        context=context,
        repeats=request.repeats,
    )
    if not request.eval_windows:
        return workload, None
    length = min(request.eval_tokens, decoder.max_positions)
    return workload, evaluation_windows(request.eval_data, tokenizer, request.eval_windows, length)


def _report(
    request: Request,
    artifact: Path,
    manifest: Manifest,
    decoder: Outline,
    workload: Workload,
    windows: TokenWindows | None,
    outcomes: Sequence[Outcome],
    noise: Noise,
    together: bool,
) -> Report:
    environment = describe_environment(workload.cores, outcomes)
    runs = tuple(run_record(outcome, workload, decoder, environment) for outcome in outcomes)
    recorded = noise_record(noise)
    return Report(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dlp_deploy=version("dlp-deploy"),
        artifact=artifact.name,
        model=manifest.source.name,
        command=_command(request, workload),
        environment=environment,
        evaluation=_evaluated(request, windows),
        all_loaded=together,
        runs=runs,
        comparisons=compare_runs(runs),
        noise=recorded,
        warnings=warnings(runs, recorded),
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
