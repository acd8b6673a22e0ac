"""A report as CSV, for spreadsheets and plots of one's own."""

from __future__ import annotations

import csv
import io

from .report import Comparison, Report, Run


def to_csv(report: Report) -> str:
    """One line per run."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(_csv_row(report, report.runs[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(report, run) for run in report.runs)
    return stream.getvalue()


def _ci95(comparison: Comparison | None) -> tuple[float | None, float | None]:
    return comparison.ci95 if comparison and comparison.ci95 else (None, None)


def _csv_row(report: Report, run: Run) -> dict[str, object]:
    over_fp32 = report.speedup_over(run.name, report.dense_fp32)
    over_best = report.speedup_over(run.name, report.best_dense)
    return {
        "run": run.name,
        "engine": run.engine,
        "precision": run.precision,
        "sparsity": round(run.sparsity, 6),
        "dense": run.dense,
        "status": run.status,
        "cores": run.cores,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": run.new_tokens,
        "context": run.context,
        "tpot_ms_mean": run.tpot_ms and run.tpot_ms.mean,
        "tpot_ms_p50": run.tpot_ms and run.tpot_ms.p50,
        "tpot_ms_p90": run.tpot_ms and run.tpot_ms.p90,
        "tpot_ms_p99": run.tpot_ms and run.tpot_ms.p99,
        "drift": run.drift,
        "ttft_ms_p50": run.ttft_ms and run.ttft_ms.p50,
        "ttft_ms_p90": run.ttft_ms and run.ttft_ms.p90,
        "ttft_ms_p99": run.ttft_ms and run.ttft_ms.p99,
        "tokens_per_s": run.tokens_per_s,
        "speedup_over_dense_fp32": over_fp32 and over_fp32.speedup,
        "dense_fp32_ci95_low": _ci95(over_fp32)[0],
        "dense_fp32_ci95_high": _ci95(over_fp32)[1],
        "speedup_over_best_dense": over_best and over_best.speedup,
        "best_dense_ci95_low": _ci95(over_best)[0],
        "best_dense_ci95_high": _ci95(over_best)[1],
        "weight_bytes": run.weight_bytes,
        "bytes_per_token": run.roofline and run.roofline.weight_bytes + run.roofline.kv_bytes,
        "bytes_estimated": run.roofline and run.roofline.estimated,
        "operations_per_token": run.roofline and run.roofline.operations,
        "bandwidth_share": run.roofline and run.roofline.bandwidth_share,
        "compute_share": run.roofline and run.roofline.compute_share,
        "peak_rss_bytes": run.peak_rss_bytes,
        "load_s": run.load_s,
        "perplexity": run.perplexity,
        "perplexity_stderr": run.perplexity_stderr,
    }
