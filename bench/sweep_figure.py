"""The figure of a sweep: time per token and speed-up by sparsity, and what of it was extrapolated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .extrapolate import origin
from .plot import INK, new_figure, set_heading, shown_to
from .points import Point, baselines
from .report import Comparison, Run

COLORS = {"fp32": "#1d6fa5", "int8": "#2a8c82", "int4": "#e08e45"}
# Of dense models that were measured, and that were extrapolated: in other engines, and in ONNX Runtime.
Dashes = str | tuple[int, tuple[int, int]]
DASHES: tuple[tuple[Dashes, Dashes], ...] = (("-.", (0, (1, 4))), ("--", ":"))
# Inches.
LEGEND_LINE = 0.19

# A run, and the point that it is of.
Placed = tuple[Point, Run]


def speedup_figure(points: Sequence[Point]) -> Figure:
    """Time per token on the left and speed-up over dense fp32 on the right, by sparsity; dense models are
    dashed, as they do not depend on it. Without dense fp32, over the best dense model.

    What is extrapolated has hollow markers or dotted lines, and is labelled with what it is extrapolated
    from. Bars are over rounds on both sides: an extrapolated run has nothing else.
    """
    figure = new_figure(12.5, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_latency(left, points)
    _draw_speedup(right, points)
    for axes in (left, right):
        axes.set_xlabel("sparsity of the block weights (%)", fontsize=9, color=INK)
        axes.grid(color="#d9dee3", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-3, 100)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.14))
    lines = max(len(axes.get_legend_handles_labels()[1]) for axes in (left, right))
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * lines)
    set_heading(figure, title(points[0]))
    figure.supxlabel(_caption(points), fontsize=8, color=INK, x=0.01, ha="left")
    return figure


def title(point: Point) -> str:
    """What was measured where, and at which lengths."""
    run, cores = point.sparse, point.sparse.cores
    return (
        f"{point.report.model} on {cores} core{'s' if cores > 1 else ''} of {point.report.environment.cpu}: "
        f"{run.engine}, prompt {run.prompt_tokens}, {run.new_tokens} new tokens, context {run.context}"
    )


def _caption(points: Sequence[Point]) -> str:
    text = (
        "Random weights of the real shape, with the same sparsity in every layer. Markers: medians; bars: "
        "from the fastest to the slowest round on the left, 95% interval over rounds on the right.\n"
        "Bars that leave the figure are longer."
    )
    if any(run.extrapolated_from for point in points for run in point.report.runs):
        text += (
            " Hollow markers and dotted lines: extrapolated to all blocks, not measured (of a speed-up: "
            "either side)."
        )
    return text


def _draw_latency(axes: Axes, points: Sequence[Point]) -> None:
    axes.set_title("Time per token (ms)", fontsize=10, loc="left")
    for quant, series in _series(points):
        _draw_series(axes, quant, series, [_of_rounds(run) for _, run in series])
    for name in baselines(points):
        dense = _timed(points, name)
        _draw_dense(axes, name, dense, [run.tpot_ms.p50 for _, run in dense if run.tpot_ms])


def _of_rounds(run: Run) -> tuple[float, float, float]:
    """The fastest round, the median time per token, and the slowest round."""
    assert run.tpot_ms is not None
    rounds = np.median(run.samples, axis=1)
    return rounds.min(), run.tpot_ms.p50, rounds.max()


def _draw_speedup(axes: Axes, points: Sequence[Point]) -> None:
    baseline = _reference(points)
    axes.set_title(f"Speed-up over {baseline or 'dense'}", fontsize=10, loc="left")
    _draw_dense(axes, baseline or "dense", _timed(points, baseline), [1.0])
    for quant, series in _series(points):
        runs, ratios = _compared(series, baseline)
        _draw_series(axes, quant, runs, [_with_interval(ratio) for ratio in ratios], baseline)
    for name in baselines(points):
        runs, ratios = _compared(_timed(points, name), baseline)
        _draw_dense(axes, name, runs, [ratio.speedup for ratio in ratios], baseline)


def _with_interval(comparison: Comparison) -> tuple[float, float, float]:
    """Low, middle and high; without an interval they are one."""
    low, high = comparison.ci95 or (comparison.speedup, comparison.speedup)
    return low, comparison.speedup, high


def _draw_series(
    axes: Axes,
    quant: str,
    runs: Sequence[Placed],
    values: Sequence[tuple[float, float, float]],
    baseline: str | None = None,
) -> None:
    """One precision. `values`: low, middle and high of each run, or of its ratio to `baseline`."""
    _show(axes, values)
    low, middle, high = np.array(values).reshape(-1, 3).T
    places = np.array([100 * point.sparsity for point, _ in runs])
    color = COLORS.get(quant)
    axes.errorbar(places, middle, yerr=np.maximum(0, (middle - low, high - middle)), capsize=3, color=color)
    hollow = np.array([_is_extrapolated(point, run, baseline) for point, run in runs], dtype=bool)
    for chosen in (np.flatnonzero(~hollow), np.flatnonzero(hollow)):
        if len(chosen):
            axes.plot(
                places[chosen],
                middle[chosen],
                "o",
                color=color,
                markerfacecolor="white" if hollow[chosen[0]] else color,
                label=f"{runs[0][1].engine} {quant}{_origin([runs[index][1] for index in chosen.tolist()])}",
            )


def _draw_dense(
    axes: Axes,
    name: str,
    runs: Sequence[Placed],
    values: Sequence[float],
    baseline: str | None = None,
) -> None:
    """A dense model, at the median of `values` over all points."""
    if not runs:
        return
    dotted = any(_is_extrapolated(point, run, baseline) for point, run in runs)
    middle = float(np.median(values))
    _show(axes, [(middle, middle, middle)])
    axes.axhline(
        middle,
        color=next((color for precision, color in COLORS.items() if precision in name), INK),
        linestyle=DASHES[runs[0][1].engine == "onnxruntime"][dotted],
        linewidth=1.4 if dotted else 1.1,
        label=f"{name}{_origin([run for _, run in runs])}",
    )


def _show(axes: Axes, values: Sequence[tuple[float, float, float]]) -> None:
    """Let the axis reach as far as these bars do, but not far beyond their middles."""
    if values:
        drawn = axes.get_ylim()[1] if axes.lines else 0.0
        longest = max(high for *_, high in values)
        axes.set_ylim(0, max(drawn, min(1.05 * longest, shown_to(middle for _, middle, _ in values))))


def _is_extrapolated(point: Point, run: Run, baseline: str | None) -> bool:
    """Whether the run is, or what it is compared with."""
    other = point.run(baseline) if baseline else None
    return bool(run.extrapolated_from or (other and other.extrapolated_from))


def _origin(runs: Sequence[Run]) -> str:
    """What any of them was extrapolated from, in brackets."""
    found = dict.fromkeys(filter(None, map(origin, runs)))
    return f" ({'; '.join(found)})" if found else ""


def _series(points: Sequence[Point]) -> Iterator[tuple[str, list[Placed]]]:
    """The timed sparse runs of each precision."""
    for quant in dict.fromkeys(point.quant for point in points):
        series = sorted((p for p in points if p.quant == quant), key=lambda point: point.sparsity)
        runs = [(point, point.sparse) for point in series]
        yield quant, [(point, run) for point, run in runs if run.tpot_ms]


def _timed(points: Sequence[Point], name: str | None) -> list[Placed]:
    """The run called `name` of each point that timed it."""
    runs = [(point, point.run(name)) for point in points if name]
    return [(point, run) for point, run in runs if run and run.tpot_ms]


def _compared(runs: Sequence[Placed], baseline: str | None) -> tuple[list[Placed], list[Comparison]]:
    """Those of `runs` that were compared with `baseline`, and how."""
    found = [(point, run, point.report.speedup_over(run.name, baseline)) for point, run in runs]
    compared = [(point, run, ratio) for point, run, ratio in found if ratio]
    return [(point, run) for point, run, _ in compared], [ratio for *_, ratio in compared]


def _reference(points: Sequence[Point]) -> str | None:
    """What the figure compares with: dense fp32 as in the paper, or else the best dense model."""
    return next((p.report.dense_fp32 or p.report.best_dense for p in points if p.report.best_dense), None)
