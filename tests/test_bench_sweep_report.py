"""What a sweep says of its points: how they were measured, and which of them were not."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from dlp_deploy.bench.assemble import compare_runs
from dlp_deploy.bench.extrapolate import extrapolate
from dlp_deploy.bench.points import Point
from dlp_deploy.bench.report import EngineRecord, Report, Run
from dlp_deploy.bench.sweep_figure import speedup_figure
from dlp_deploy.bench.sweep_report import to_markdown

from .bench_reports import DENSE, SPARSE, environment, point, report

ROUNDS = np.full((5, 8), 5.0)
VARIED = np.array([[10.0], [11], [12], [13], [14]]) + np.linspace(-3, 3, 7)
ORIGIN = "extrapolated from 2 and 4 of 32 decoder blocks"


def extrapolated(name: str, times: np.ndarray = VARIED) -> Run:
    """A run of 32 blocks that takes `times`, from runs of 2 and 4."""
    runs = [
        report({name: count / 32 * times}).runs[0].model_copy(update={"blocks": count}) for count in (2, 4)
    ]
    return extrapolate(*runs, name, 32, environment())


def mixed(sparsity: float = 0.7) -> Point:
    """A point whose dense fp32 is extrapolated, and nothing else."""
    measured = report({"onnxruntime-int8-dense": 2 * VARIED, SPARSE: VARIED})
    runs = (extrapolated(DENSE, 4 * VARIED), *measured.runs)
    return point(
        measured.model_copy(update={"runs": runs, "comparisons": compare_runs(runs)}), sparsity=sparsity
    )


def of_extrapolated_sparse() -> Point:
    runs = (extrapolated(DENSE, 4 * VARIED), extrapolated(SPARSE))
    return point(report({DENSE: ROUNDS}).model_copy(update={"runs": runs, "comparisons": compare_runs(runs)}))


def labels(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def drawn(axes: Axes, start: str) -> dict[str, object]:
    """The line whose label begins so: is it hollow, and how is it dashed?"""
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(start)]
    return {
        "hollow": line.get_marker() == "o" and to_rgba(line.get_markerfacecolor()) == to_rgba("white"),
        "style": line.get_linestyle(),
    }


def test_the_figure_says_which_models_were_extrapolated_and_from_what() -> None:
    left, right = speedup_figure([mixed(0.7), mixed(0.8)]).axes
    assert labels(left) == ["deepsparse int8", f"{DENSE} ({ORIGIN})", "onnxruntime-int8-dense"]
    assert drawn(left, "deepsparse")["hollow"] is False
    assert drawn(left, DENSE)["style"] == ":"
    assert drawn(left, "onnxruntime-int8")["style"] == "--"
    # What is compared with an extrapolated time is no measurement either.
    assert right.get_title(loc="left") == f"Speed-up over {DENSE}"
    assert labels(right) == [f"{DENSE} ({ORIGIN})", "deepsparse int8", "onnxruntime-int8-dense"]
    assert drawn(right, DENSE)["style"] == ":"
    assert drawn(right, "deepsparse")["hollow"] is True
    assert drawn(right, "onnxruntime-int8")["style"] == ":"


def test_what_was_measured_is_not_marked() -> None:
    figure = speedup_figure([point(report({DENSE: 4 * VARIED, SPARSE: VARIED}))])
    assert not any("extrapolated" in text for axes in figure.axes for text in labels(axes))
    assert drawn(figure.axes[1], "deepsparse")["hollow"] is False
    assert "Hollow" not in figure.get_supxlabel()
    assert "Hollow" in speedup_figure([mixed()]).get_supxlabel()


def bars(axes: Axes) -> list[np.ndarray]:
    return [segment[:, 1] for container in axes.containers for segment in container[2][0].get_segments()]


@pytest.mark.parametrize("swept", [mixed(), of_extrapolated_sparse()])
def test_bars_are_over_rounds_whether_a_model_was_measured_or_extrapolated(swept: Point) -> None:
    figure = speedup_figure([swept])
    (bar,) = bars(figure.axes[0])
    np.testing.assert_allclose(bar, (10, 14))
    assert "from the fastest to the slowest round" in figure.get_supxlabel()


def test_a_bar_that_is_far_longer_than_others_leaves_the_figure() -> None:
    unsure = np.array([[1.0], [8.0]]) * ROUNDS[:2]
    swept = [point(report({DENSE: 4 * ROUNDS[:2], SPARSE: times})) for times in (unsure, ROUNDS[:2])]
    _, right = speedup_figure(swept).axes
    assert 4 < right.get_ylim()[1] < 12


def test_dense_models_of_one_precision_in_two_engines_are_told_apart() -> None:
    other = "llamacpp-int8-dense"
    samples = {"onnxruntime-int8-dense": ROUNDS, other: 1.1 * ROUNDS, SPARSE: ROUNDS}
    left, _ = speedup_figure([point(report(samples))]).axes
    assert drawn(left, other)["style"] != drawn(left, "onnxruntime-int8")["style"]


def test_the_table_names_what_was_extrapolated_from_what() -> None:
    text = to_markdown([mixed(0.7), mixed(0.8)])
    assert text.count(f"{ORIGIN} ({DENSE})") == 1
    assert f"{ORIGIN} ({DENSE}, sparse deepsparse-int8)" in to_markdown([of_extrapolated_sparse()])


def test_how_each_model_was_quantized_is_said_once() -> None:
    stored = report({DENSE: ROUNDS, SPARSE: ROUNDS})
    runs = tuple(run.model_copy(update={"notes": (f"grid of {run.name}",)}) for run in stored.runs)
    points = [point(stored.model_copy(update={"runs": runs}), sparsity=sparsity) for sparsity in (0.5, 0.7)]
    text = to_markdown(points)
    assert text.count(f"- {DENSE}: grid of {DENSE}") == 1
    assert text.count(f"- sparse deepsparse-int8: grid of {SPARSE}") == 1
    assert "## Graphs" not in to_markdown([point(stored)])


def test_a_sweep_says_that_its_sparsity_is_uniform() -> None:
    assert "uniform, the same in every layer" in to_markdown([mixed()])


def test_outputs_of_models_that_took_turns_were_not_checked_in_the_process_that_was_timed() -> None:
    stored = report({DENSE: ROUNDS, SPARSE: ROUNDS})
    assert "in the process that was timed" in to_markdown([point(stored)])
    apart: Report = stored.model_copy(update={"all_loaded": False})
    assert "in a process like the one that was timed" in to_markdown([point(stored), point(apart)])


def test_points_that_were_measured_by_other_versions_are_named() -> None:
    samples = {DENSE: 4 * ROUNDS, SPARSE: ROUNDS}

    def engine(version: str) -> dict[str, EngineRecord]:
        record = EngineRecord(title="ORT", licence="MIT", versions={"onnxruntime": version}, notes=())
        return {"onnxruntime": record}

    first = point(report(samples, engines=engine("1.23"), git_revision="abc"))
    second = point(report(samples, engines=engine("1.24"), git_revision="abd"), 0.8)
    text = to_markdown([first, second])
    assert "- points differ in onnxruntime of ORT: 1.23, 1.24" in text
    assert "- points differ in git revision: abc, abd" in text
    assert "differ in" not in to_markdown([first, first])
