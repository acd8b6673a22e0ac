"""What every form of a report says: its title, its headline, and one row per run."""

from __future__ import annotations

from .report import Comparison, Report, Run

HEADINGS = (
    "run",
    "ms/token\n(p50)",
    "tokens/s",
    "over dense\nfp32",
    "over best\ndense",
    "first token\nms",
    "weights\nMB",
    "peak memory\nMB",
    "perplexity",
)


def title(report: Report) -> str:
    """What was measured where, and at which lengths."""
    run, cores = report.runs[0], report.runs[0].cores
    return (
        f"{report.model} on {cores} core{'s' if cores > 1 else ''} of {report.environment.cpu}: "
        f"prompt {run.prompt_tokens}, {run.new_tokens} new tokens, context {run.context}"
    )


def headline(report: Report) -> str:
    """The fastest sparse run in one sentence: its speed-up over dense fp32 and over the best dense run."""
    fastest = fastest_sparse(report)
    parts = [
        f"{comparison.speedup:.2f}x {comparison.baseline}{_bracketed(comparison)}"
        for comparison in _headline_comparisons(report, fastest)
    ]
    return f"{fastest.name} decodes at {' and '.join(parts)}." if fastest and parts else ""


def fastest_sparse(report: Report) -> Run | None:
    """The sparse run with the shortest median time per token; None where none was timed."""
    medians = {run.name: run.tpot_ms.p50 for run in report.runs if run.tpot_ms and not run.dense}
    return report.run(min(medians, key=lambda name: medians[name])) if medians else None


def run_rows(report: Report) -> list[list[str]]:
    """One row per run, below HEADINGS; dashes for a run that was not timed."""
    return [_row(report, run) for run in report.runs]


def interval(comparison: Comparison) -> str:
    """Its 95 % interval, or a dash where one round gives none."""
    return "-" if comparison.ci95 is None else f"{comparison.ci95[0]:.2f} to {comparison.ci95[1]:.2f}"


def _row(report: Report, run: Run) -> list[str]:
    weights = f"{run.weight_bytes / 1e6:.0f}"
    if not (run.tpot_ms and run.ttft_ms and run.tokens_per_s and run.peak_rss_bytes):
        return [run.name, run.status, *["-"] * 4, weights, "-", "-"]
    return [
        run.name,
        f"{run.tpot_ms.p50:.2f}",
        f"{run.tokens_per_s:.1f}",
        _speedup(report, run, report.dense_fp32),
        _speedup(report, run, report.best_dense),
        f"{run.ttft_ms.p50:.0f}",
        weights,
        f"{run.peak_rss_bytes / 1e6:.0f}",
        _perplexity(run),
    ]


def _speedup(report: Report, run: Run, baseline: str | None) -> str:
    if run.name == baseline:
        return "1.00x"
    comparison = report.speedup_over(run.name, baseline)
    return f"{comparison.speedup:.2f}x" if comparison else "-"


def _perplexity(run: Run) -> str:
    if run.perplexity is None:
        return "-"
    error = f" ± {run.perplexity_stderr:.2f}" if run.perplexity_stderr is not None else ""
    return f"{run.perplexity:.2f}{error}"


def _bracketed(comparison: Comparison) -> str:
    return f" (95% interval {interval(comparison)})" if comparison.ci95 else " (one round, no interval)"


def _headline_comparisons(report: Report, run: Run | None) -> list[Comparison]:
    if run is None:
        return []
    baselines = dict.fromkeys((report.dense_fp32, report.best_dense))
    found = [report.speedup_over(run.name, baseline) for baseline in baselines]
    return [comparison for comparison in found if comparison]
