"""What changed between two bench reports, and whether it is more than noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .present import markdown_table
from .report import Report, Run, read_report
from .statistics import Ratio, ratio_of_medians, ratio_of_speedups


@dataclass(frozen=True)
class Change:
    """A figure of both reports: after / before, with its 95 % bootstrap interval."""

    name: str
    before: float
    after: float
    ratio: Ratio

    @property
    def verdict(self) -> str:
        if self.ratio.low <= 1 <= self.ratio.high:
            return "within noise"
        return "higher" if self.ratio.median > 1 else "lower"


@dataclass(frozen=True)
class Difference:
    """A fact that the two reports state differently; None where one does not state it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ReportChanges:
    facts: tuple[Difference, ...]
    runs: tuple[Difference, ...]
    latencies: tuple[Change, ...]
    speedups: tuple[Change, ...]


def compare(before: str | Path, after: str | Path) -> ReportChanges:
    """Compare two report.json files.

    Times per token are compared as ratios of medians, speed-ups as ratios of speed-ups. Intervals come
    from the raw samples of each report, whose rounds are resampled; they know how much rounds differ
    within a report, and nothing of what differs between two days, such as heat or the placement of
    memory. Speed-ups are free of most of that. Raises UserError for a file that is no report.
    """
    return compare_reports(read_report(Path(before)), read_report(Path(after)))


def compare_reports(before: Report, after: Report) -> ReportChanges:
    timed = [{run.name: run for run in report.runs if run.tpot_ms} for report in (before, after)]
    return ReportChanges(
        facts=tuple(_differences(_facts(before), _facts(after))),
        runs=tuple(_differences(_states(before), _states(after))),
        latencies=tuple(_latency(run, timed[1][name]) for name, run in timed[0].items() if name in timed[1]),
        speedups=tuple(_speedups(before, after, *timed)),
    )


def to_markdown(changes: ReportChanges) -> str:
    """The changes as tables, the decisive ones first."""
    sections = [
        ("Speed-ups", _change_table(changes.speedups, "x")),
        ("Time per token (ms, median)", _change_table(changes.latencies, "")),
        ("Runs", _difference_table(changes.runs)),
        ("Environment and arguments", _difference_table(changes.facts)),
    ]
    return "\n\n".join(f"## {title}\n\n{table or 'no difference'}" for title, table in sections) + "\n"


def _latency(before: Run, after: Run) -> Change:
    ratio = ratio_of_medians(after.samples, before.samples)
    assert before.tpot_ms is not None
    assert after.tpot_ms is not None
    return Change(before.name, before.tpot_ms.p50, after.tpot_ms.p50, ratio)


def _speedups(
    before: Report, after: Report, timed: Mapping[str, Run], timed_after: Mapping[str, Run]
) -> Iterator[Change]:
    for was in before.comparisons:
        now = after.speedup_over(was.run, was.baseline)
        if now is None or timed[was.run].dense:
            continue
        later, earlier = (
            (runs[was.baseline].samples, runs[was.run].samples) for runs in (timed_after, timed)
        )
        ratio = ratio_of_speedups(later, earlier)
        yield Change(f"{was.run} over {was.baseline}", was.speedup, now.speedup, ratio)


def _facts(report: Report) -> dict[str, Any]:
    """Everything but the figures, flat."""
    stored = report.model_dump()
    keys = ("dlp_deploy", "artifact", "model", "command", "environment", "evaluation")
    return dict(_flat({key: stored[key] for key in keys}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _states(report: Report) -> dict[str, str]:
    return {run.name: run.reason or run.status for run in report.runs}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield Difference(name, before.get(name), after.get(name))


def _change_table(changes: tuple[Change, ...], unit: str) -> str:
    rows = [
        [
            change.name,
            f"{change.before:.2f}{unit}",
            f"{change.after:.2f}{unit}",
            f"{change.ratio.median - 1:+.1%}",
            f"{change.ratio.low - 1:+.1%} to {change.ratio.high - 1:+.1%}",
            change.verdict,
        ]
        for change in changes
    ]
    return markdown_table(("", "before", "after", "change", "95% interval", "verdict"), rows) if rows else ""


def _difference_table(differences: tuple[Difference, ...]) -> str:
    rows = [[d.name, _text(d.before), _text(d.after)] for d in differences]
    return markdown_table(("", "before", "after"), rows) if rows else ""


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
