"""A sweep for people: Markdown, CSV, and the figure of speed-up by sparsity."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..progress import say
from ..storage import write_text
from .markdown import environment_lines, markdown_table
from .plot import INK, new_figure, save
from .points import Point
from .report import Comparison, Report, Run
from .summary import interval

COLORS = {"fp32": "#1d6fa5", "int8": "#2a8c82", "int4": "#e08e45"}


def write_sweep_report(points: Sequence[Point], path: Path) -> None:
    """Write .md, .csv, .png and .svg beside the JSONL file `path`."""
    write_text(path.with_suffix(".md"), to_markdown(points))
    write_text(path.with_suffix(".csv"), to_csv(points))
    save(speedup_figure(points), path.with_suffix(".png"))
    say(f"Sweep: {path}, and .md, .csv, .png and .svg beside it")


def to_markdown(points: Sequence[Point]) -> str:
    """All points in one table, with their speed-ups over each dense baseline of their own rounds."""
    first = points[0]
    baselines = _baselines(points)
    headings = [
        "precision",
        "sparsity",
        "ms/token (p50)",
        "tokens/s",
        *(f"over {name}" for name in baselines),
    ]
    rows = [_row(point, baselines) for point in points]
    blocks = [
        f"# Speed by sparsity: {_title(first)}",
        "Random weights of the real shape, magnitude-pruned to each sparsity; the operators of an exported "
        "model. Speed-ups: medians of paired ratios from interleaved rounds, with 95% intervals over rounds.",
        markdown_table([*headings, "of the nearer roof"], rows),
        _extrapolation_note(points),
        "## Dense baselines\n\n" + _dense_table(points),
        "## Outputs\n\n" + _outputs_note(points),
        "## Warnings\n\n" + "\n".join([*_mixed_versions(points), *_warnings(points)] or ["none"]),
        "## Machine\n\n" + "\n".join(environment_lines(first.report.environment)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_csv(points: Sequence[Point]) -> str:
    """One line per point and baseline."""
    stream = io.StringIO()
    rows = list(_csv_rows(points))
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def speedup_figure(points: Sequence[Point]) -> Figure:
    """Time per token on the left and speed-up over dense fp32 on the right, by sparsity; dense models are
    dashed, as they do not depend on it. Without dense fp32, over the best dense model."""
    figure = new_figure(12.5, 5.2)
    left, right = figure.subplots(1, 2)
    _draw_latency(left, points)
    _draw_speedup(right, points)
    for axes in (left, right):
        axes.set_xlabel("sparsity of the block weights (%)", fontsize=9, color=INK)
        axes.grid(color="#d9dee3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-3, 100)
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    figure.suptitle(_title(points[0]), fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _draw_latency(axes: Axes, points: Sequence[Point]) -> None:
    axes.set_title("Time per token (ms, median; bars: 10th to 90th percentile)", fontsize=10, loc="left")
    for quant, series in _series(points):
        timed = [point for point in series if point.sparse.tpot_ms]
        samples = [np.percentile(point.sparse.samples_ms, (10, 50, 90)) for point in timed]
        _error_bars(
            axes, timed, np.array(samples).reshape(-1, 3), quant, f"{points[0].sparse.engine} {quant}"
        )
    for name in _baselines(points):
        medians = [run.tpot_ms.p50 for point in points if (run := _run(point, name)) and run.tpot_ms]
        if medians:
            axes.axhline(
                float(np.median(medians)), color=_color(name), linestyle="--", linewidth=1.1, label=name
            )


def _draw_speedup(axes: Axes, points: Sequence[Point]) -> None:
    baseline = _reference(points)
    axes.set_title(f"Speed-up over {baseline or 'dense'} (bars: 95% interval)", fontsize=10, loc="left")
    axes.axhline(1, color=INK, linewidth=0.8)
    for quant, series in _series(points):
        compared = [
            (point, found) for point in series if (found := _over(point, point.sparse.name, baseline))
        ]
        values = np.array([_with_interval(c) for _, c in compared]).reshape(-1, 3)
        _error_bars(
            axes, [point for point, _ in compared], values, quant, f"{points[0].sparse.engine} {quant}"
        )
    for name in _baselines(points):
        ratios = [found.speedup for point in points if (found := _over(point, name, baseline))]
        if ratios:
            axes.axhline(
                float(np.median(ratios)), color=_color(name), linestyle="--", linewidth=1.1, label=name
            )


def _with_interval(comparison: Comparison) -> tuple[float, float, float]:
    """Low, middle and high; without an interval they are one."""
    low, high = comparison.ci95 or (comparison.speedup, comparison.speedup)
    return low, comparison.speedup, high


def _error_bars(axes: Axes, points: Sequence[Point], values: np.ndarray, quant: str, label: str) -> None:
    """`values` [points, 3]: low, middle and high."""
    low, middle, high = values.T
    places = [100 * point.sparsity for point in points]
    errors = np.maximum(0, (middle - low, high - middle))
    axes.errorbar(places, middle, yerr=errors, marker="o", capsize=3, color=COLORS.get(quant), label=label)


def _series(points: Sequence[Point]) -> Iterator[tuple[str, list[Point]]]:
    for quant in dict.fromkeys(point.quant for point in points):
        yield quant, [point for point in points if point.quant == quant]


def _baselines(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(run.name for point in points for run in point.report.runs if run.dense))


def _reference(points: Sequence[Point]) -> str | None:
    """What the figure compares with: dense fp32 as in the paper, or else the best dense model."""
    return next((p.report.dense_fp32 or p.report.best_dense for p in points if p.report.best_dense), None)


def _run(point: Point, name: str) -> Run | None:
    return next((run for run in point.report.runs if run.name == name), None)


def _over(point: Point, name: str, baseline: str | None) -> Comparison | None:
    return point.report.speedup_over(name, baseline)


def _color(name: str) -> str:
    return next((color for precision, color in COLORS.items() if precision in name), INK)


def _title(point: Point) -> str:
    run, cores = point.sparse, point.sparse.cores
    return (
        f"{point.report.model} on {cores} core{'s' if cores > 1 else ''} of {point.report.environment.cpu}: "
        f"{run.engine}, prompt {run.prompt_tokens}, {run.new_tokens} new tokens, context {run.context}"
    )


def _row(point: Point, baselines: Sequence[str]) -> list[str]:
    run = point.sparse
    cells = [f"{run.precision}{'*' if run.extrapolated_from else ''}", f"{100 * point.sparsity:g}%"]
    if run.tpot_ms is None or run.tokens_per_s is None:
        return [*cells, run.status, "-", *("-" for _ in baselines), "-"]
    compared = (_over(point, run.name, name) for name in baselines)
    ratios = [f"{c.speedup:.2f}x ({interval(c)})" if c else "-" for c in compared]
    return [*cells, f"{run.tpot_ms.p50:.2f}", f"{run.tokens_per_s:.1f}", *ratios, _share(run)]


def _share(run: Run) -> str:
    if run.roofline is None:
        return "-"
    return f"{'~' if run.roofline.estimated else ''}{run.roofline.share:.0%} of {run.roofline.bound}"


def _dense_table(points: Sequence[Point]) -> str:
    rows = []
    for name in _baselines(points):
        runs = [run for point in points if (run := _run(point, name)) and run.tpot_ms]
        medians = [run.tpot_ms.p50 for run in runs if run.tpot_ms]
        if medians:
            star = "*" if runs[0].extrapolated_from else ""
            spread = f"{min(medians):.2f} to {max(medians):.2f}"
            rows.append([name + star, f"{np.median(medians):.2f}", spread, _share(runs[0])])
    return markdown_table(("model", "ms/token (p50)", "over all points", "of the nearer roof"), rows)


def _extrapolation_note(points: Sequence[Point]) -> str:
    """Which blocks were measured, for the models that were not measured whole."""
    counts = {run.blocks for point in points for run in point.measured}
    if not counts:
        return ""
    listed = " and ".join(map(str, sorted(count for count in counts if count)))
    return (
        f"\\* Extrapolated to the whole model from runs with {listed} decoder blocks of the same rounds: "
        "time = fixed part + blocks x time per block. Where so few blocks fit into the caches and the whole "
        "model does not, this is too fast."
    )


def _outputs_note(points: Sequence[Point]) -> str:
    """What the runs were held against before they were timed."""
    runs = [run for point in points for run in _made(point) if run.status == "ok"]
    references = [run.depth_check.reference for run in runs if run.depth_check]
    deep, others = references.count("torch"), sum(name != "torch" for name in references)
    held = sum(run.output_check is not None for run in runs)
    lines = [
        f"{held} of {len(runs)} timed runs were held against torch in fp32 (the weights before quantization) "
        f"at the beginning of the text, and {deep} at the timed depth too, in the process that was timed.",
    ]
    if others:
        lines.append(f"{others} were held at that depth against a dense fp32 run of the same rounds.")
    if unknown := len(runs) - len(references):
        lines.append(f"Of {unknown} it is only known that their logits there are finite numbers.")
    return " ".join(lines)


def _made(point: Point) -> list[Run]:
    """The runs of a point that were made; those of whole models may have been extrapolated from them."""
    return [run for run in (*point.report.runs, *point.measured) if not run.extrapolated_from]


def _mixed_versions(points: Sequence[Point]) -> Iterator[str]:
    """What was not the same when all points were measured: a sweep may have been carried on much later."""
    stated = [_versions(point.report) for point in points]
    for name in dict.fromkeys(name for versions in stated for name in versions):
        values = dict.fromkeys(versions[name] for versions in stated if name in versions)
        if len(values) > 1:
            yield f"- points differ in {name}: {', '.join(values)}; --force measures all again"


def _versions(report: Report) -> dict[str, str]:
    environment = report.environment
    versions = {"dlp-deploy": report.dlp_deploy, "git revision": environment.git_revision or "none"}
    versions |= {"python": environment.versions.get("python", "none"), "kernel": environment.kernel}
    for engine in environment.engines.values():
        versions |= {f"{name} of {engine.title}": number for name, number in engine.versions.items()}
    return versions


def _warnings(points: Sequence[Point]) -> list[str]:
    return [
        f"- {point.quant}, sparsity {point.sparsity:g}: {warning}"
        for point in points
        for warning in point.report.warnings
    ]


def _csv_rows(points: Sequence[Point]) -> Iterator[dict[str, object]]:
    for point in points:
        run = point.sparse
        for name in _baselines(points) or [""]:
            compared, dense = _over(point, run.name, name), _run(point, name)
            yield {
                "shape": point.shape,
                "engine": run.engine,
                "precision": run.precision,
                "sparsity": point.sparsity,
                "status": run.status,
                "extrapolated": bool(run.extrapolated_from),
                "tpot_ms_p50": run.tpot_ms and run.tpot_ms.p50,
                "tokens_per_s": run.tokens_per_s,
                "ttft_ms_p50": run.ttft_ms and run.ttft_ms.p50,
                "baseline": name,
                "baseline_extrapolated": bool(dense and dense.extrapolated_from),
                "baseline_tpot_ms_p50": dense and dense.tpot_ms and dense.tpot_ms.p50,
                "speedup": compared and compared.speedup,
                "ci95_low": compared and compared.ci95 and compared.ci95[0],
                "ci95_high": compared and compared.ci95 and compared.ci95[1],
                "bandwidth_share": run.roofline and run.roofline.bandwidth_share,
                "compute_share": run.roofline and run.roofline.compute_share,
            }
