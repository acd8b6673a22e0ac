"""Expected time per token on a machine that is not here, from what was measured on one that is.

    time = max(compute / (cores x clock), bytes / bandwidth) + serial / clock

`compute` (core-milliseconds per token) and `serial` come from reports at one or more numbers of cores
(`scaling.py`), and `bytes` are those of the roofline. A projection is an expectation, not a measurement, and
says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserError
from ..storage import write_text
from .extrapolate import origin
from .markdown import markdown_table
from .outputs import require_suffix
from .points import as_report, read_points
from .report import Report, Roofline, Run, read_report
from .scaling import fit_parts

# Share of the published bandwidth that reading weights is taken to sustain.
SUSTAINED = 0.8
# From this share of the measured bandwidth on, a run is taken to have waited for memory.
MEMORY_BOUND = 0.7


@dataclass(frozen=True)
class Target:
    """A machine: `bandwidth_gbps` is what its cores together can read; `clock_ghz` None: as measured."""

    name: str
    cores: int
    bandwidth_gbps: float
    clock_ghz: float | None = None
    source: str = "as given"


MACHINES = {
    "xeon-6248r": Target(
        "xeon-6248r",
        cores=24,
        bandwidth_gbps=SUSTAINED * 6 * 8 * 2.933,
        clock_ghz=3.0,
        source="Xeon Gold 6248R, one socket: 24 cores, base clock 3.0 GHz, six channels of DDR4-2933 "
        f"(140.8 GB/s, of which {SUSTAINED:.0%} are taken as sustained)",
    ),
}


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class ProjectedRun(_Stored):
    """Milliseconds per token: `measured_ms` where it was measured, and the parts of `projected_ms`.

    `check_ms` is what was measured on the machine that was projected to, and `error` the relative
    deviation of the projection from it.
    """

    name: str
    dense: bool
    measured_ms: float
    compute_ms: float
    memory_ms: float
    serial_ms: float
    projected_ms: float
    bound: Literal["bandwidth", "compute"]
    bytes_estimated: bool
    check_ms: float | None = None
    error: float | None = None


class ProjectedSpeedup(_Stored):
    run: str
    baseline: str
    speedup: float


class Projection(_Stored):
    """Projected, not measured."""

    kind: Literal["projected"] = "projected"
    target: str
    cores: int
    bandwidth_gbps: float
    clock_ghz: float | None
    measured_on: str
    measured_cores: tuple[int, ...]
    assumptions: tuple[str, ...]
    runs: tuple[ProjectedRun, ...]
    speedups: tuple[ProjectedSpeedup, ...]


def project(
    reports: Sequence[str | Path],
    machine: str | None = None,
    cores: int | None = None,
    bandwidth: float | None = None,
    clock: float | None = None,
    check: str | Path | None = None,
    output: str | Path | None = None,
) -> Projection:
    """Project bench reports of one machine, or sweeps (.jsonl), to another; the result is written beside the
    first of them.

    The other is a known `machine` (xeon-6248r), of which `cores`, `bandwidth` (GB/s that the cores
    together can read) and `clock` (GHz) replace single figures, or is described by these alone. With
    `check`, a report, the projection is to the machine and cores of that report, and is compared with
    what it measured. `output` defaults to <report>.<machine>.json; .md is written beside it. Raises
    UserError for reports that cannot be projected, machines that are not described, and an output that is
    there and is no projection.
    """
    measured = [_read(Path(report)) for report in reports]
    checked = _read(Path(check)) if check else None
    if checked and (machine or cores or bandwidth or clock):
        raise UserError("--check projects to the machine of that report; leave out --machine and its figures")
    target = _target_of(checked) if checked else describe_target(machine, cores, bandwidth, clock)
    projection = project_reports(measured, target, checked)
    path = Path(output) if output else Path(reports[0]).with_suffix(f".{target.name}.json")
    _refuse_measured(path)
    write_text(path.with_suffix(".md"), to_markdown(projection))
    write_text(path, projection.model_dump_json(indent=2) + "\n")
    return projection


def _read(path: Path) -> Report:
    if path.suffix != ".jsonl":
        return read_report(path)
    if not path.exists() or not (points := read_points(path)):
        raise UserError(f"{path} has no finished point of a sweep; give a report.json or a sweep's .jsonl")
    return as_report(points)


def _refuse_measured(path: Path) -> None:
    """Raise UserError where a projection would take the place of something else, such as a measurement."""
    require_suffix(path, ".json")
    if path.exists() and not _is_projection(path):
        raise UserError(f"{path} is no projection and would be replaced; give another --output")


def _is_projection(path: Path) -> bool:
    try:
        Projection.model_validate_json(path.read_bytes())
    except ValidationError:
        return False
    return True


def describe_target(
    machine: str | None, cores: int | None, bandwidth: float | None, clock: float | None
) -> Target:
    """The machine to project to. Raises UserError when it is unknown or not described."""
    if machine is not None and machine not in MACHINES:
        raise UserError(
            f"--machine {machine} is not known; give {', '.join(MACHINES)}, or --cores and --bandwidth"
        )
    for option, value in (("--cores", cores), ("--bandwidth", bandwidth), ("--clock", clock)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option} {value}: give a number above 0")
    if machine:
        return _changed(MACHINES[machine], cores, bandwidth, clock)
    if not cores or not bandwidth:
        raise UserError(
            "describe the machine: --machine xeon-6248r, or --cores N --bandwidth GB/s [--clock GHz]"
        )
    return Target(f"{cores}-cores", cores, bandwidth, clock)


def _changed(known: Target, cores: int | None, bandwidth: float | None, clock: float | None) -> Target:
    """A known machine with other figures, which its description then tells."""
    given = {"cores": cores, "GB/s": bandwidth, "GHz": clock}
    told = ", ".join(f"{value:g} {unit}" for unit, value in given.items() if value)
    return replace(
        known,
        cores=cores or known.cores,
        bandwidth_gbps=bandwidth or known.bandwidth_gbps,
        clock_ghz=clock or known.clock_ghz,
        source=f"{known.source}; but with {told}, as given" if told else known.source,
    )


def project_reports(reports: Sequence[Report], target: Target, checked: Report | None = None) -> Projection:
    """The projection of all runs that every one of `reports` has timed."""
    first = reports[0]
    _require_alike([*reports, checked] if checked else reports)
    faster = _clock_ratio(first, target)
    names = [run.name for run in first.runs if all(_timed(report, run.name) for report in reports)]
    if not names:
        raise UserError("the reports have no timed run in common; give reports of one artifact")
    runs = tuple(_project_run([report.run(name) for report in reports], target, faster) for name in names)
    if checked:
        runs = tuple(_checked(run, checked) for run in runs)
    return Projection(
        target=target.name,
        cores=target.cores,
        bandwidth_gbps=target.bandwidth_gbps,
        clock_ghz=target.clock_ghz,
        measured_on=first.environment.cpu,
        measured_cores=tuple(len(report.environment.cores_used) for report in reports),
        assumptions=_assumptions(reports, target),
        runs=runs,
        speedups=tuple(
            ProjectedSpeedup(run=run.name, baseline=base.name, speedup=base.projected_ms / run.projected_ms)
            for run in runs
            for base in runs
            if base.dense and not run.dense
        ),
    )


def _project_run(measured: Sequence[Run], target: Target, faster: float) -> ProjectedRun:
    times = np.array([run.tpot_ms.p50 for run in measured if run.tpot_ms])
    waits = np.array([_memory_ms(run) for run in measured])
    compute, serial = fit_parts(np.array([run.cores for run in measured]), times, waits)
    roofs = _roofs(measured[0])
    compute_ms = compute / (target.cores * faster)
    memory_ms = (roofs.weight_bytes + roofs.kv_bytes) / target.bandwidth_gbps / 1e6
    return ProjectedRun(
        name=measured[0].name,
        dense=measured[0].dense,
        measured_ms=float(times[0]),
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        serial_ms=serial / faster,
        projected_ms=max(compute_ms, memory_ms) + serial / faster,
        bound="bandwidth" if memory_ms > compute_ms else "compute",
        bytes_estimated=roofs.estimated,
    )


def _roofs(run: Run) -> Roofline:
    if run.roofline is None:
        raise UserError(f"the report has no bytes per token of {run.name}; measure it again")
    return run.roofline


def _memory_ms(run: Run) -> float:
    """What the bytes of a token took at the bandwidth that was measured beside the run: all of its time at
    most, which it seems to exceed where caches hold a part of them."""
    return run.tpot_ms.p50 * min(1.0, _roofs(run).bandwidth_share) if run.tpot_ms else 0.0


def _checked(run: ProjectedRun, report: Report) -> ProjectedRun:
    found = next((each.tpot_ms for each in report.runs if each.name == run.name), None)
    if found is None:
        return run
    return run.model_copy(update={"check_ms": found.p50, "error": run.projected_ms / found.p50 - 1})


def _timed(report: Report, name: str) -> bool:
    return any(run.name == name and run.tpot_ms for run in report.runs)


def _target_of(report: Report) -> Target:
    environment = report.environment
    count = len(environment.cores_used)
    return Target(
        f"check-{count}-cores",
        count,
        environment.memory_bandwidth_gbps,
        environment.clock_ghz,
        f"{count} cores of {environment.cpu}, as measured by the report that this is checked against",
    )


def _clock_ratio(report: Report, target: Target) -> float:
    clock = report.environment.clock_ghz
    return target.clock_ghz / clock if target.clock_ghz and clock else 1.0


def _require_alike(reports: Sequence[Report]) -> None:
    def conditions(report: Report) -> tuple[object, ...]:
        run = report.runs[0]
        return report.artifact, report.environment.cpu, run.prompt_tokens, run.new_tokens, run.context

    for report in reports[1:]:
        if conditions(report) != conditions(reports[0]):
            raise UserError(
                "the reports differ in more than cores; give benches of one artifact on one machine"
            )


def _assumptions(reports: Sequence[Report], target: Target) -> tuple[str, ...]:
    environment = reports[0].environment
    counts = sorted({len(report.environment.cores_used) for report in reports})
    serial = (
        f"the serial part is Amdahl's, fitted with what memory allowed to {', '.join(map(str, counts))} cores"
        if len(counts) > 1
        else f"no serial part: {counts[0]} core(s) measured alone do not show one, so this is optimistic"
    )
    return (
        f"the machine: {target.source}; its cores read {target.bandwidth_gbps:.1f} GB/s together",
        "time = max(compute / cores, bytes / bandwidth) + serial part",
        "a core does per clock what one of the measured processor does: the same instruction sets and caches",
        _clock_assumption(environment.clock_ghz, target.clock_ghz),
        serial,
        *_extrapolated(reports),
        *_memory_bound(reports),
        "threads of one socket: nothing is added for synchronizing more of them",
    )


def _clock_assumption(measured_ghz: float | None, target_ghz: float | None) -> str:
    if target_ghz is None:
        return "the clock is that of the measurement"
    if measured_ghz is None:
        return f"the report does not tell its clock, so that {target_ghz:.2f} GHz are taken to be the same"
    return f"a core's time scales with the clock, from {measured_ghz:.2f} to {target_ghz:.2f} GHz"


def _extrapolated(reports: Sequence[Report]) -> Iterator[str]:
    """Runs that were not measured whole in the first place."""
    runs = [run for report in reports for run in report.runs if run.extrapolated_from]
    if runs:
        told = dict.fromkeys(f"{run.name} ({origin(run)})" for run in runs)
        yield f"what is called measured was itself extrapolated of {', '.join(told)}"


def _memory_bound(reports: Sequence[Report]) -> Iterator[str]:
    """Runs that cannot have spent all of their time on arithmetic, which is what cores and clock divide."""
    runs = [run for report in reports for run in report.runs]
    waited = [run.name for run in runs if run.roofline and run.roofline.bandwidth_share > MEMORY_BOUND]
    if waited:
        yield (
            f"{', '.join(dict.fromkeys(waited))} waited for memory, so their arithmetic may take less than "
            "is known: the compute part of these, and speed-ups over them, may be too large"
        )


def to_markdown(projection: Projection) -> str:
    """The projection as tables, with its assumptions before the figures."""
    measured = ", ".join(map(str, projection.measured_cores))
    blocks = [
        f"# Projected, not measured: {projection.target}",
        f"From measurements on {measured} core(s) of {projection.measured_on}, to {projection.cores} cores.",
        "Assumptions:\n\n" + "\n".join(f"- {line}" for line in projection.assumptions),
        _runs_table(projection),
    ]
    if any(run.bytes_estimated for run in projection.runs):
        blocks.append("~ The bytes of this run are an estimate: see its bench report.")
    if projection.speedups:
        rows = [[s.run, s.baseline, f"{s.speedup:.2f}x"] for s in projection.speedups]
        blocks.append(markdown_table(("run", "baseline", "projected speed-up"), rows))
    return "\n\n".join(blocks) + "\n"


def _runs_table(projection: Projection) -> str:
    checked = any(run.check_ms for run in projection.runs)
    headings = ["run", "measured ms/token", "compute", "memory", "serial", "projected ms/token", "bound"]
    rows = []
    for run in projection.runs:
        memory = f"{'~' if run.bytes_estimated else ''}{run.memory_ms:.2f}"
        parts = [
            f"{run.compute_ms:.2f}",
            memory,
            f"{run.serial_ms:.2f}",
            f"{run.projected_ms:.2f}",
            run.bound,
        ]
        check = (
            [f"{run.check_ms:.2f}", f"{run.error:+.1%}"]
            if run.check_ms and run.error is not None
            else ["-"] * 2
        )
        rows.append([run.name, f"{run.measured_ms:.2f}", *parts, *(check if checked else [])])
    return markdown_table([*headings, *(["measured there", "error"] if checked else [])], rows)
