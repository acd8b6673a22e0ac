"""The pictures of a report: time per token, how much faster than which dense baseline, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..storage import atomic_path
from .report import Comparison, Report, Run

DENSE, SPARSE = "#9aa5b1", "#2a8c82"
FP32, BEST = "#1d6fa5", "#e08e45"
INK = "#22303c"
# Of the headings' font.
LETTERS_PER_INCH = 10.5
# An interval of two rounds may be a thousand times as wide as its middle, which would then not be seen.
SHOWN = 2.0
# Inches.
LEGEND_LINE = 0.21


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `path`, a .png, and as .svg beside it."""
    for kind in ("png", "svg"):
        with atomic_path(path.with_suffix(f".{kind}")) as temporary:
            figure.savefig(temporary, format=kind)


def set_heading(figure: Figure, text: str) -> None:
    """The title of a figure, in as many lines as its width asks for."""
    width = int(LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(fill(text, width), fontsize=11, color=INK, x=0.01, ha="left")


def shown_to(values: Iterable[float]) -> float:
    """The most that an axis shows, for the sake of these values; what leads beyond is cut off."""
    return SHOWN * max(values, default=1.0)


def overview(report: Report) -> Figure:
    """One bar per timed run on the left, and the speed-ups of sparse runs on the right."""
    timed = [run for run in report.runs if run.tpot_ms]
    figure = new_figure(12.5, 2.2 + 0.5 * max(4, len(timed)))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _latency_bars(left, timed)
    _speedup_bars(right, report, [run for run in timed if not run.dense])
    set_heading(figure, _heading(report))
    return figure


def roofline_figure(report: Report) -> Figure:
    """Rate of each timed run over its operations per byte, below the roofs measured on the same cores."""
    points = [(run, run.roofline) for run in report.runs if run.roofline]
    figure = new_figure(9.5, 5.2 + LEGEND_LINE * (len(points) // 2 + 1))
    axes = figure.subplots()
    intensities = [limits.gops / limits.gbps for _, limits in points] or [1.0]
    span = np.geomspace(min(intensities) / 3, 300, 200)
    _roofs(axes, report, span)
    for index, (run, limits) in enumerate(points):
        axes.plot(
            limits.gops / limits.gbps,
            limits.gops,
            "s" if run.dense else "o",
            color=colormaps["tab20"](index % 20),
            markeredgecolor=INK,
            markersize=8,
            label=f"{run.name}: {limits.share:.0%} of {limits.bound}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte read", fontsize=9, color=INK)
    axes.set_ylabel("10⁹ operations per second", fontsize=9, color=INK)
    axes.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2)
    axes.grid(color="#d9dee3", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Decoding under the roofs of the machine (squares: dense)", fontsize=10, loc="left")
    set_heading(figure, _heading(report))
    return figure


def _roofs(axes: Axes, report: Report, span: np.ndarray) -> None:
    environment = report.environment
    slope = environment.memory_bandwidth_gbps
    peaks = {"fp32": environment.peak_fp32_gops, "int8": environment.peak_int8_gops}
    for (name, peak), color in zip(peaks.items(), (FP32, BEST), strict=True):
        if peak:
            label = f"{name}: {peak:.0f} · 10⁹/s; memory: {slope:.1f} GB/s"
            axes.plot(span, np.minimum(slope * span, peak), color=color, linewidth=1.6, label=label)


def _heading(report: Report) -> str:
    run = report.runs[0]
    return (
        f"{report.model}: {run.cores} core{'s' if run.cores > 1 else ''} of {report.environment.cpu}, "
        f"prompt {run.prompt_tokens}, {run.new_tokens} new tokens, context {run.context}"
    )


def _latency_bars(axes: Axes, runs: list[Run]) -> None:
    _clean(axes, "Time per token (ms, median; line: to the 90th percentile)")
    longest = max((run.tpot_ms.p90 for run in runs if run.tpot_ms), default=1.0)
    for row, run in enumerate(runs):
        assert run.tpot_ms is not None
        middle, high = run.tpot_ms.p50, run.tpot_ms.p90
        axes.barh(row, middle, height=0.62, color=DENSE if run.dense else SPARSE)
        axes.plot((middle, high), (row, row), color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.text(
            max(middle, high) + 0.015 * longest, row, f"{middle:.3g}", va="center", fontsize=9, color=INK
        )
    axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=9)
    axes.set_ylim(max(1, len(runs)) - 0.5, -0.5)
    axes.set_xlim(0, 1.14 * longest)
    _legend(axes, {"dense": DENSE, "sparse": SPARSE})


def _speedup_bars(axes: Axes, report: Report, runs: list[Run]) -> None:
    baselines = [name for name in dict.fromkeys((report.dense_fp32, report.best_dense)) if name]
    found = [
        (row, index, comparison)
        for index, baseline in enumerate(baselines)
        for row, run in enumerate(runs)
        if (comparison := report.speedup_over(run.name, baseline))
    ]
    most = shown_to([1.0, *(comparison.speedup for *_, comparison in found)])
    cut = any(comparison.ci95 and comparison.ci95[1] > most for *_, comparison in found)
    _clean(axes, f"Speed-up of sparse runs (line: 95% interval{'; arrow: longer' if cut else ''})")
    height = 0.62 / max(1, len(baselines))
    for row, index, comparison in found:
        place = row + (index - (len(baselines) - 1) / 2) * height
        color = FP32 if comparison.baseline == report.dense_fp32 else BEST
        axes.barh(place, comparison.speedup, height=0.9 * height, color=color)
        _interval_line(axes, comparison, place, most)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=9)
    axes.set_ylim(max(1, len(runs)) - 0.5, -0.5)
    axes.set_xlim(0, 1.2 * max((_end(comparison, most) for *_, comparison in found), default=1.0))
    colors = {f"over {name}": FP32 if name == report.dense_fp32 else BEST for name in baselines}
    _legend(axes, colors)


def _interval_line(axes: Axes, comparison: Comparison, place: float, most: float) -> None:
    """Its interval, as far as it is shown, and the speed-up in figures behind that."""
    end = _end(comparison, most)
    if comparison.ci95:
        line = (comparison.ci95[0], end)
        axes.plot(line, (place, place), color=INK, linewidth=1.4, solid_capstyle="butt")
        if comparison.ci95[1] > end:
            axes.plot(end, place, ">", color=INK, markersize=5)
    axes.annotate(
        f"{comparison.speedup:.2f}x",
        (end, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )


def _end(comparison: Comparison, most: float) -> float:
    return min(most, comparison.ci95[1]) if comparison.ci95 else comparison.speedup


def _legend(axes: Axes, colors: dict[str, str]) -> None:
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0, -0.07),
        ncols=1 if max(map(len, colors), default=0) > 10 else 2,
        fontsize=9,
        frameon=False,
        borderaxespad=0.4,
    )


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.grid(axis="x", color="#d9dee3", linewidth=0.6)
    axes.set_axisbelow(True)
