"""What changed between two bench reports, and whether it is more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .markdown import markdown_table
from .report import Report, Run, read_report
from .statistics import Ratio, ratio_of_medians, ratio_of_speedups

# Measured anew for every report, so that they always differ and say nothing of the conditions.
MEASURED = (
    "environment.memory_bandwidth_gbps",
    "environment.memory_bandwidth_spread",
    "environment.peak_fp32_gops",
    "environment.peak_int8_gops",
    "environment.clock_ghz",
)


# What times depend on besides the machine and the software: of all runs, and of each of them.
MODEL = ("model", "artifact")
WORK = ("cores", "prompt_tokens", "new_tokens", "context", "filled_tokens", "block_size")


@dataclass(frozen=True)
class Change:
    """A figure of both reports: after / before, with its 95 % interval."""

    name: str
    before: float
    after: float
    ratio: Ratio

    @property
    def verdict(self) -> str:
        if self.ratio.interval is None:
            return "unknown: one round"
        low, high = self.ratio.interval
        if low <= 1 <= high:
            return "within noise"
        return "higher" if self.ratio.value > 1 else "lower"


@dataclass(frozen=True)
class Figure:
    """A figure that each report states once. `error` is the standard error of the difference, if known, and
    `unlike` says why the two are not to be compared, if so."""

    name: str
    before: float
    after: float
    error: float | None = None
    unlike: str = ""

    @property
    def verdict(self) -> str:
        if self.unlike:
            return self.unlike
        difference = self.after - self.before
        if difference == 0:
            return "the same"
        if self.error is not None and abs(difference) <= 1.96 * self.error:
            return "within its error"
        return "higher" if difference > 0 else "lower"


@dataclass(frozen=True)
class Difference:
    """A fact that the two reports state differently; None where one does not state it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ReportChanges:
    work: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    runs: tuple[Difference, ...]
    latencies: tuple[Change, ...]
    first_tokens: tuple[Change, ...]
    speedups: tuple[Change, ...]
    figures: tuple[Figure, ...]


def compare(before: str | Path, after: str | Path) -> ReportChanges:
    """Compare two report.json files.

    Times are compared as ratios of medians, speed-ups as ratios of speed-ups. Intervals come from the
    medians of the rounds of each report; they know how much rounds differ within a report, and nothing of
    what differs between two days, such as heat or the placement of memory. Speed-ups are free of most of
    that. Memory, sizes, output errors and perplexity are set side by side; perplexities on the same text are
    judged by their standard errors, as if it were two texts drawn apart. Raises UserError for a file that is
    no report.
    """
    return compare_reports(read_report(Path(before)), read_report(Path(after)))


def compare_reports(before: Report, after: Report) -> ReportChanges:
    timed = [{run.name: run for run in report.runs if run.tpot_ms} for report in (before, after)]
    pairs = [(run, timed[1][name]) for name, run in timed[0].items() if name in timed[1]]
    unlike_texts = "" if before.evaluation == after.evaluation else "of different texts"
    return ReportChanges(
        work=(
            *_unlike_models(before, after),
            *(difference for pair in pairs for difference in _unlike_work(*pair)),
        ),
        facts=tuple(_differences(_facts(before), _facts(after))),
        runs=tuple(_differences(_states(before), _states(after))),
        latencies=tuple(_latency(*pair) for pair in pairs),
        first_tokens=tuple(_first_token(*pair) for pair in pairs),
        speedups=tuple(_speedups(before, after, *timed)),
        figures=tuple(figure for pair in pairs for figure in _figures(*pair, unlike_texts)),
    )


def to_markdown(changes: ReportChanges) -> str:
    """The changes as tables, the decisive ones first."""
    sections = [
        ("Speed-ups", _change_table(changes.speedups, "x")),
        ("Time per token (ms, median)", _change_table(changes.latencies, "")),
        ("Time to the first token (ms, median)", _change_table(changes.first_tokens, "")),
        ("Memory, size and quality", _figure_table(changes.figures)),
        ("Runs", _difference_table(changes.runs)),
        ("Environment and arguments", _difference_table(changes.facts)),
    ]
    blocks = [f"## {title}\n\n{table or 'no difference'}" for title, table in sections]
    if changes.work:
        told = "Runs of the same name were not given the same work, so that times say nothing of a change:"
        blocks.insert(0, f"{told}\n\n{_difference_table(changes.work)}")
    return "\n\n".join(blocks) + "\n"


def _unlike_models(before: Report, after: Report) -> Iterator[Difference]:
    """Runs are named after engine, precision and sparsity, so that those of two models may be namesakes."""
    for name in MODEL:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield Difference(name, was, now)


def _unlike_work(before: Run, after: Run) -> Iterator[Difference]:
    for name in WORK:
        was, now = getattr(before, name), getattr(after, name)
        if was != now and not (was is None or now is None):
            yield Difference(f"{before.name}: {name}", was, now)


def _latency(before: Run, after: Run) -> Change:
    ratio = ratio_of_medians(after.samples, before.samples)
    assert before.tpot_ms is not None
    assert after.tpot_ms is not None
    return Change(before.name, before.tpot_ms.p50, after.tpot_ms.p50, ratio)


def _first_token(before: Run, after: Run) -> Change:
    times = [np.array(run.ttft_samples_ms)[:, None] for run in (after, before)]
    return Change(
        before.name, float(np.median(times[1])), float(np.median(times[0])), ratio_of_medians(*times)
    )


def _figures(before: Run, after: Run, unlike_texts: str) -> Iterator[Figure]:
    stated = _stated(before), _stated(after)
    for name, was in stated[0].items():
        now = stated[1][name]
        if was is not None and now is not None:
            yield Figure(f"{before.name}: {name}", was, now)
    if before.perplexity is not None and after.perplexity is not None:
        errors = [each for each in (before.perplexity_stderr, after.perplexity_stderr) if each is not None]
        error = math.hypot(*errors) if len(errors) == 2 else None
        name = f"{before.name}: perplexity"
        yield Figure(name, before.perplexity, after.perplexity, error, unlike_texts)


def _stated(run: Run) -> dict[str, float | None]:
    check = run.output_check
    return {
        "peak memory, MB": _mega(run.peak_rss_bytes),
        "weights, MB": _mega(run.weight_bytes),
        "max output error": check.max_rel_error if check else None,
        "mean output error": check.mean_rel_error if check else None,
    }


def _mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6


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
    flat = dict(_flat({key: stored[key] for key in keys}))
    return {name: value for name, value in flat.items() if name not in MEASURED}


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
            f"{change.ratio.value - 1:+.1%}",
            _interval(change.ratio),
            change.verdict,
        ]
        for change in changes
    ]
    return markdown_table(("", "before", "after", "change", "95% interval", "verdict"), rows) if rows else ""


def _interval(ratio: Ratio) -> str:
    return "-" if ratio.interval is None else " to ".join(f"{end - 1:+.1%}" for end in ratio.interval)


def _figure_table(figures: tuple[Figure, ...]) -> str:
    rows = [
        [
            figure.name,
            f"{figure.before:.4g}",
            f"{figure.after:.4g}",
            f"{figure.after / figure.before - 1:+.1%}" if figure.before else "-",
            "-" if figure.error is None else f"{figure.error:.2g}",
            figure.verdict,
        ]
        for figure in figures
    ]
    headings = ("", "before", "after", "change", "its standard error", "verdict")
    return markdown_table(headings, rows) if rows else ""


def _difference_table(differences: tuple[Difference, ...]) -> str:
    rows = [[d.name, _text(d.before), _text(d.after)] for d in differences]
    return markdown_table(("", "before", "after"), rows) if rows else ""


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
