"""A report in Markdown: the whole of it but its raw samples."""

from __future__ import annotations

from collections.abc import Sequence

from .report import Environment, Report
from .summary import HEADINGS, headline, interval, run_rows, title

# Weights of so many times the caches do not gain from them.
CACHED = 4


def to_markdown(report: Report) -> str:
    """The whole report but its raw samples."""
    blocks = [
        f"# Bench of {report.artifact}",
        f"{title(report)}. {report.created}, dlp-deploy {report.dlp_deploy}.",
        headline(report),
        markdown_table(HEADINGS, run_rows(report)),
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


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and the others to the right."""
    headings = [heading.replace("\n", " ") for heading in headings]
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, marks, *rows))


def environment_lines(environment: Environment) -> list[str]:
    """The machine, its settings and the engines, as list items."""
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


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [f"## {heading}", "\n".join(lines)] if lines else []


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
    if weight_bytes < CACHED * (environment.cache_bytes or environment.caches.get("L3", 0)):
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
        f"In {_processes(report)}, at the depth that was timed:",
        "",
        markdown_table(headings, rows),
        *_unchecked_lines(report),
    ]


def _processes(report: Report) -> str:
    if report.all_loaded:
        return "the processes that were timed"
    # What takes turns in memory is loaded again, and of a bench that was stopped it is not known what did.
    return "processes that had loaded what was timed, perhaps not the very ones"


def _unchecked_lines(report: Report) -> list[str]:
    names = [run.name for run in report.runs if run.tpot_ms and not run.depth_check]
    if not names:
        return []
    return ["", f"Only known to be finite there, for want of a reference: {', '.join(names)}."]


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _spread(environment: Environment) -> str:
    spread = environment.memory_bandwidth_spread
    return "" if spread is None else f" (before and after the runs: {spread:.0%} apart)"
