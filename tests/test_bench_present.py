"""What reports say of peculiar figures: beyond the memory's rate, of one round, of mixed versions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dlp_deploy.bench.markdown import to_markdown
from dlp_deploy.bench.plot import overview, roofline_figure, save
from dlp_deploy.bench.present import print_report
from dlp_deploy.bench.report import DepthAgreement
from dlp_deploy.bench.summary import run_rows
from dlp_deploy.bench.sweep_report import to_csv as sweep_csv
from dlp_deploy.bench.sweep_report import to_markdown as sweep_markdown
from dlp_deploy.bench.sweep_report import write_sweep_report
from dlp_deploy.bench.table_csv import to_csv

from .bench_reports import DENSE, SPARSE, point, report

ROUNDS = np.full((5, 8), 5.0)


@pytest.mark.parametrize(
    ("l3_bytes", "cache_bytes", "reason"),
    [
        (1 << 28, 1 << 28, "the caches hold a part"),
        (1 << 24, 1 << 24, "far more weights than"),
        # Eight third level caches, of which each core uses one; and a report that does not tell.
        (1 << 24, 1 << 27, "the caches hold a part"),
        (1 << 28, None, "the caches hold a part"),
    ],
)
def test_more_than_the_memory_gives_is_explained_by_caches_only_where_they_are_large(
    l3_bytes: int, cache_bytes: int | None, reason: str
) -> None:
    # 0.1 GB in 5 ms are twice the 10 GB/s of the memory.
    caches = {"caches": {"L3": l3_bytes}, "cache_bytes": cache_bytes}
    text = to_markdown(report({SPARSE: ROUNDS}, gigabytes=0.1, **caches))
    assert "| 200% |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("More than 100 %")]
    assert reason in line


def test_the_nearer_roof_is_the_larger_share() -> None:
    limits = report({SPARSE: ROUNDS}, peak_int8_gops=15.0).runs[0].roofline
    assert limits is not None
    assert (limits.share, limits.bound) == (limits.bandwidth_share, "bandwidth")
    limits = report({SPARSE: ROUNDS}, peak_int8_gops=5.0).runs[0].roofline
    assert limits is not None
    assert (limits.share, limits.bound) == (limits.compute_share, "compute")
    limits = report({SPARSE: ROUNDS}, peak_int8_gops=None).runs[0].roofline
    assert limits is not None
    assert limits.share == limits.bandwidth_share


def test_a_report_of_one_round_claims_no_interval(tmp_path: Path) -> None:
    stored = report({DENSE: 4 * ROUNDS[:1], SPARSE: ROUNDS[:1]})
    text = to_markdown(stored)
    assert f"decodes at 4.00x {DENSE} (one round, no interval)" in text
    assert f"| {SPARSE} | {DENSE} | 4.00x | - |" in text
    assert "95% interval)" not in text
    assert f"\n{SPARSE}," in to_csv(stored)
    save(overview(stored), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0
    swept = point(stored)
    write_sweep_report([swept], tmp_path / "s.jsonl")
    assert "| 4.00x (-) |" in sweep_markdown([swept])
    assert ",4.0,,," in sweep_csv([swept])


def test_the_papers_baseline_is_onnx_runtimes_where_there_are_two() -> None:
    both = {"llamacpp-fp32-dense": ROUNDS, DENSE: 2 * ROUNDS, SPARSE: ROUNDS}
    assert report(both).dense_fp32 == DENSE
    assert report({"llamacpp-fp32-dense": ROUNDS}).dense_fp32 == "llamacpp-fp32-dense"
    assert report({SPARSE: ROUNDS}).dense_fp32 is None


def test_only_where_all_models_stayed_loaded_was_the_timed_process_itself_checked() -> None:
    check = DepthAgreement(
        reference="torch",
        depth=256,
        positions=8,
        max_rel_error=1e-5,
        mean_rel_error=1e-6,
        greedy_match=1.0,
        limited="max_rel_error",
        limit=1e-3,
    )
    stored = report({SPARSE: ROUNDS})
    stored = stored.model_copy(update={"runs": (stored.runs[0].model_copy(update={"depth_check": check}),)})
    assert "In the processes that were timed, at the depth" in to_markdown(stored)
    apart = to_markdown(stored.model_copy(update={"all_loaded": False}))
    assert "In processes that had loaded what was timed, perhaps not the very ones, at the depth" in apart


def test_an_interval_of_few_rounds_does_not_hide_the_speed_ups() -> None:
    unsure = np.array([[1.0], [8.0]]) * ROUNDS[:2]
    stored = report({DENSE: 4 * ROUNDS[:2], SPARSE: unsure, "onnxruntime-int8-s70": ROUNDS[:2]})
    comparison = stored.speedup_over(SPARSE, DENSE)
    assert comparison is not None
    assert comparison.ci95 is not None
    assert comparison.ci95[1] > 1000
    _, right = overview(stored).axes
    assert right.get_xlim()[1] < 12
    assert "arrow" in right.get_title(loc="left")
    sure = report({DENSE: 4 * ROUNDS, SPARSE: ROUNDS})
    assert "arrow" not in overview(sure).axes[1].get_title(loc="left")


def test_names_and_many_runs_have_room_in_the_figures() -> None:
    engines, precisions = ("deepsparse", "llamacpp", "onnxruntime", "torch"), ("fp32", "int8", "int4")
    names = [f"{e}-{p}-{kind}" for kind in ("dense", "s70") for e in engines for p in precisions]
    stored = report(dict.fromkeys(names, ROUNDS), cpu="Intel(R) Xeon(R) Gold 6248R CPU @ 3.00GHz")
    stored = stored.model_copy(update={"model": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"})
    for figure in (overview(stored), roofline_figure(stored)):
        figure.draw_without_rendering()
        assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)
        for axes in figure.axes:
            height = axes.get_window_extent().height / figure.dpi
            assert height > 3
    colors = {
        (line.get_marker(), line.get_color()) for line in figure.axes[0].lines if line.get_marker() != "None"
    }
    assert len(colors) == len(names)


@pytest.mark.parametrize(("width", "tables"), [(140, 1), (80, 2), (45, 8)])
def test_no_figure_is_cut_off_on_a_narrow_terminal(width: int, tables: int) -> None:
    stored = report({DENSE: 5 * ROUNDS, SPARSE: ROUNDS})
    quality = {"perplexity": 163.07, "perplexity_stderr": 8.28, "peak_rss_bytes": 1_542_000_000}
    runs = tuple(run.model_copy(update=quality) for run in stored.runs)
    stored = stored.model_copy(update={"runs": runs})
    stream = io.StringIO()
    print_report(stored, Console(file=stream, width=width, force_terminal=True, color_system=None))
    lines = [line for line in stream.getvalue().splitlines() if "decodes at" not in line]
    for row in run_rows(stored):
        shown = [line.split(row[0])[1] for line in lines if line.strip().startswith(f"{row[0]} ")]
        assert "".join(shown).split() == " ".join(row[1:]).split()
        assert len(shown) == tables
    assert "\u2026" not in stream.getvalue()
