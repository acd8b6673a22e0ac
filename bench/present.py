"""A report for people: a table on the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .report import Comparison, Environment, Report, Run

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
# Off a terminal the table is not squeezed into 80 columns.
LOG_WIDTH = 140
# Weights of so many times the L3 cache do not gain from it.
CACHED = 4


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the comparison on stdout, with what to be wary of below it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(_title(report), markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for line in (headline(report), *(f"Note: {warning}." for warning in report.warnings)):
        if line:
            console.print(line, markup=False, soft_wrap=True)


def headline(report: Report) -> str:
    """The fastest sparse run in one sentence: its speed-up over dense fp32 and over the best dense run."""
    fastest = fastest_sparse(report)
    parts = [
        f"{comparison.speedup:.2f}x {comparison.baseline}{_bracketed(comparison)}"
        for comparison in _headline_comparisons(report, fastest)
    ]
    return f"{fastest.name} decodes at {' and '.join(parts)}." if fastest and parts else ""


def fastest_sparse(report: Report) -> Run | None:
    medians = {run.name: run.tpot_ms.p50 for run in report.runs if run.tpot_ms and not run.dense}
    return report.run(min(medians, key=lambda name: medians[name])) if medians else None


def to_markdown(report: Report) -> str:
    """The whole report but its raw samples."""
    blocks = [
        f"# Bench of {report.artifact}",
        f"{_title(report)}. {report.created}, dlp-deploy {report.dlp_deploy}.",
        headline(report),
        markdown_table(HEADINGS, _rows(report)),
        _explanation(report),
        *_section("Warnings", [f"- {warning}" for warning in report.warnings]),
        *_section("Speed-ups", [_comparisons_table(report)] if report.comparisons else []),
        *_section("Latency (ms)", [_latency_table(report)]),
        *_section("What limits it", _roofline_lines(report)),
        *_section("Outputs", [_checks_table(report), *_depth_lines(report)]),
        *_section("Notes", [f"- {run.name}: {'; '.join(run.notes)}" for run in report.runs if run.notes]),
        *_section("Machine", environment_lines(report.environment)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def to_csv(report: Report) -> str:
    """One line per run."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(_csv_row(report, report.runs[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(report, run) for run in report.runs)
    return stream.getvalue()


def _title(report: Report) -> str:
    run, cores = report.runs[0], report.runs[0].cores
    return (
        f"{report.model} on {cores} core{'s' if cores > 1 else ''} of {report.environment.cpu}: "
        f"prompt {run.prompt_tokens}, {run.new_tokens} new tokens, context {run.context}"
    )


def _rows(report: Report) -> list[list[str]]:
    return [_row(report, run) for run in report.runs]


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


def interval(comparison: Comparison) -> str:
    """Its 95 % interval, or a dash where one round gives none."""
    return "-" if comparison.ci95 is None else f"{comparison.ci95[0]:.2f} to {comparison.ci95[1]:.2f}"


def _bracketed(comparison: Comparison) -> str:
    return f" (95% interval {interval(comparison)})" if comparison.ci95 else " (one round, no interval)"


def _headline_comparisons(report: Report, run: Run | None) -> list[Comparison]:
    if run is None:
        return []
    baselines = dict.fromkeys((report.dense_fp32, report.best_dense))
    found = [report.speedup_over(run.name, baseline) for baseline in baselines]
    return [comparison for comparison in found if comparison]


def _explanation(report: Report) -> str:
    lines = [
        "ms/token is the median time per generated token after the first; tokens/s follows from its mean.",
        "Speed-ups are medians of paired ratios from interleaved rounds; their intervals are Student's, over "
        "the logarithms of the ratios of single rounds.",
        "Peak memory is that of the engine's process, from loading to the last token.",
    ]
    if filled := report.runs[0].filled_tokens:
        lines.append(f"Before the prompt, the cache was filled with {filled} tokens, untimed.")
    if text := report.evaluation:
        lines.append(
            f"Perplexity is taken in the engine, on {text.windows} windows of {text.tokens_per_window} "
            f"tokens of {text.data}, with its standard error over windows."
        )
    return " ".join(lines)


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    headings = [heading.replace("\n", " ") for heading in headings]
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, marks, *rows))


def _comparisons_table(report: Report) -> str:
    rows = [
        [c.run, c.baseline, f"{c.speedup:.2f}x", interval(c), f"{c.ttft_speedup:.2f}x"]
        for c in report.comparisons
    ]
    return markdown_table(("run", "baseline", "speed-up", "95% interval", "first token"), rows)


def _latency_table(report: Report) -> str:
    rows = [
        [
            run.name,
            *(
                f"{value:.2f}"
                for value in (run.tpot_ms.mean, run.tpot_ms.p50, run.tpot_ms.p90, run.tpot_ms.p99)
            ),
            *(f"{value:.1f}" for value in (run.ttft_ms.p50, run.ttft_ms.p90)),
            f"{run.load_s or 0:.1f}",
        ]
        for run in report.runs
        if run.tpot_ms and run.ttft_ms
    ]
    headings = ("run", "mean", "p50", "p90", "p99", "first token p50", "first token p90", "load (s)")
    return markdown_table(headings, rows)


def _roofline_lines(report: Report) -> list[str]:
    environment, limits = report.environment, [run.roofline for run in report.runs if run.roofline]
    if not limits:
        return []
    peaks = {"fp32": environment.peak_fp32_gops, "int8": environment.peak_int8_gops}
    rates = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items() if peak)
    lines = [
        f"The used cores read {environment.memory_bandwidth_gbps:.1f} GB/s and multiply matrices at "
        f"(10⁹ operations/s) {rates or 'an unmeasured rate'}. These roofs were measured in this run.",
        "",
        _roofline_table(report),
    ]
    if any(limit.estimated for limit in limits):
        lines += [
            "",
            "~ Estimate: the engine's layout of sparse weights is not public; nonzeros + 1 bit a weight.",
        ]
    if beyond := [limit for limit in limits if limit.bandwidth_share > 1]:
        lines += ["", _beyond_memory(environment, min(limit.weight_bytes for limit in beyond))]
    return lines


def _beyond_memory(environment: Environment, weight_bytes: int) -> str:
    if weight_bytes < CACHED * environment.caches.get("L3", 0):
        return "More than 100 % of the memory's rate: the caches hold a part of the weights."
    return (
        "More than 100 % of the memory's rate, and far more weights than the caches hold: the memory was "
        "slower when its rate was measured, or the estimate of the bytes is too high."
    )


def _roofline_table(report: Report) -> str:
    rows = [
        [
            run.name,
            f"{'~' if limit.estimated else ''}{limit.weight_bytes / 1e6:.1f}",
            f"{limit.kv_bytes / 1e6:.1f}",
            f"{limit.operations / 1e9:.2f}",
            f"{limit.gbps:.1f}",
            f"{limit.bandwidth_share:.0%}",
            "-" if limit.compute_share is None else f"{limit.compute_share:.0%}",
            limit.bound,
        ]
        for run in report.runs
        if (limit := run.roofline)
    ]
    headings = (
        "run",
        "weights MB/token",
        "KV cache MB/token",
        "10⁹ operations/token",
        "GB/s",
        "of the bandwidth",
        "of the peak rate",
        "nearer roof",
    )
    return markdown_table(headings, rows)


def _checks_table(report: Report) -> str:
    rows = [
        [
            run.name,
            _error(check.max_rel_error),
            _error(check.mean_rel_error),
            f"{check.limited.split('_')[0]} {check.limit:.1e}",
            f"{check.greedy_match:.0%} of {check.positions}",
            _error(check.graph_mean_rel_error) if check.graph_mean_rel_error is not None else "-",
        ]
        for run in report.runs
        if (check := run.output_check)
    ]
    headings = (
        "run",
        "max error against torch fp32",
        "mean error",
        "limit",
        "same arg max",
        "mean error against ONNX Runtime on the same graph",
    )
    return markdown_table(headings, rows)


def _depth_lines(report: Report) -> list[str]:
    checks = [(run, run.depth_check) for run in report.runs if run.depth_check]
    if not checks:
        return []
    rows = [
        [
            run.name,
            check.reference,
            f"{check.depth} to {check.depth + check.positions - 1}",
            _error(check.max_rel_error),
            _error(check.mean_rel_error),
            f"{check.limited.split('_')[0]} {check.limit:.1e}",
            f"{check.greedy_match:.0%} of {check.positions}",
        ]
        for run, check in checks
    ]
    headings = ("run", "against", "positions", "max error", "mean error", "limit", "same arg max")
    return [
        "",
        "In the processes that were timed, at the depth that was timed:",
        "",
        markdown_table(headings, rows),
        *_unchecked_lines(report),
    ]


def _unchecked_lines(report: Report) -> list[str]:
    names = [run.name for run in report.runs if run.tpot_ms and not run.depth_check]
    if not names:
        return []
    return ["", f"Only known to be finite there, for want of a reference: {', '.join(names)}."]


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def environment_lines(environment: Environment) -> list[str]:
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in environment.caches.items())
    lines = {
        "processor": f"{environment.cpu} ({', '.join(environment.isa) or 'no vector extensions'})",
        "cores": f"{environment.physical_cores} physical, {environment.usable_cores} usable; "
        f"used: {', '.join(map(str, environment.cores_used))}",
        "NUMA nodes, sockets": f"{environment.numa_nodes}, {environment.sockets}",
        "caches": caches,
        "governor": environment.governor or "not reported",
        "clock": f"{environment.clock_ghz:.2f} GHz" if environment.clock_ghz else "not reported",
        "virtual machine": "yes" if environment.hypervisor else "no",
        "memory": f"{environment.memory_bytes / 1e9:.1f} GB, "
        f"read at {environment.memory_bandwidth_gbps:.1f} GB/s by the used cores{_spread(environment)}",
        "system": f"{environment.operating_system}, Linux {environment.kernel}",
        "versions": ", ".join(f"{name} {number}" for name, number in environment.versions.items()),
        "git revision": environment.git_revision or "not a checkout",
    }
    for engine in environment.engines.values():
        versions = ", ".join(f"{name} {number}" for name, number in engine.versions.items())
        lines[engine.title] = " ".join((f"{versions}. Licence: {engine.licence}.", *engine.notes))
    return [f"- {name}: {value}" for name, value in lines.items()]


def _spread(environment: Environment) -> str:
    spread = environment.memory_bandwidth_spread
    return "" if spread is None else f" (before and after the runs: {spread:.0%} apart)"


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
