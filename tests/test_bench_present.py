"""What reports say of peculiar figures: beyond the memory's rate, of one round, of mixed versions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlp_deploy.bench.markdown import to_markdown
from dlp_deploy.bench.plot import overview, save
from dlp_deploy.bench.report import DepthAgreement
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
