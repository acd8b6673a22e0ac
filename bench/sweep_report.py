"""A sweep for people: Markdown, CSV, and the figure of speed-up by sparsity."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..progress import say
from ..storage import write_text
from .extrapolate import EXTRAPOLATED, origin
from .markdown import environment_lines, markdown_table
from .plot import save
from .points import Point, baselines
from .report import Report, Run
from .summary import interval
from .sweep_figure import speedup_figure, title


def write_sweep_report(points: Sequence[Point], path: Path) -> None:
    """Write .md, .csv, .png and .svg beside the JSONL file `path`."""
    write_text(path.with_suffix(".md"), to_markdown(points))
    write_text(path.with_suffix(".csv"), to_csv(points))
    save(speedup_figure(points), path.with_suffix(".png"))
    say(f"Sweep: {path}, and .md, .csv, .png and .svg beside it")


def to_markdown(points: Sequence[Point]) -> str:
    """All points in one table, with their speed-ups over each dense baseline of their own rounds."""
    first = points[0]
    dense = baselines(points)
    headings = [
        "precision",
        "sparsity",
        "ms/token (p50)",
        "tokens/s",
        *(f"over {name}" for name in dense),
    ]
    rows = [_row(point, dense) for point in points]
    blocks = [
        f"# Speed by sparsity: {title(first)}",
        "Random weights of the real shape, magnitude-pruned to each sparsity; the operators of an exported "
        "model. The sparsity is uniform, the same in every layer: DLP gives each block one of its own, and "
        "how fast that is was not measured here. Speed-ups: medians of paired ratios from interleaved "
        "rounds, with 95% intervals over rounds.",
        markdown_table([*headings, "of the nearer roof"], rows),
        _extrapolation_note(points),
        "## Dense baselines\n\n" + _dense_table(points),
        _graphs_section(points),
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


def _row(point: Point, dense: Sequence[str]) -> list[str]:
    run = point.sparse
    cells = [f"{run.precision}{'*' if run.extrapolated_from else ''}", f"{100 * point.sparsity:g}%"]
    if run.tpot_ms is None or run.tokens_per_s is None:
        return [*cells, run.status, "-", *("-" for _ in dense), "-"]
    compared = (point.report.speedup_over(run.name, name) for name in dense)
    ratios = [f"{c.speedup:.2f}x ({interval(c)})" if c else "-" for c in compared]
    return [*cells, f"{run.tpot_ms.p50:.2f}", f"{run.tokens_per_s:.1f}", *ratios, _share(run)]


def _share(run: Run) -> str:
    if run.roofline is None:
        return "-"
    return f"{'~' if run.roofline.estimated else ''}{run.roofline.share:.0%} of {run.roofline.bound}"


def _dense_table(points: Sequence[Point]) -> str:
    rows = []
    for name in baselines(points):
        runs = [run for point in points if (run := point.run(name)) and run.tpot_ms]
        medians = [run.tpot_ms.p50 for run in runs if run.tpot_ms]
        if medians:
            star = "*" if runs[0].extrapolated_from else ""
            spread = f"{min(medians):.2f} to {max(medians):.2f}"
            rows.append([name + star, f"{np.median(medians):.2f}", spread, _share(runs[0])])
    return markdown_table(("model", "ms/token (p50)", "over all points", "of the nearer roof"), rows)


def _extrapolation_note(points: Sequence[Point]) -> str:
    """Which blocks were measured, for the models that were not measured whole."""
    said = _said(points, lambda run: [origin(run)])
    if not said:
        return ""
    kinds = {text: [kind for kind, other in said if other == text] for _, text in said}
    found = [f"{text} ({', '.join(names)})" for text, names in kinds.items()]
    return (
        f"\\* Not measured whole, but {'; '.join(found)}: the runs are of the same rounds. Time = "
        "fixed part + blocks x time per block. Where so few blocks fit into the caches and the whole "
        "model does not, this is too fast."
    )


def _graphs_section(points: Sequence[Point]) -> str:
    """How each model was quantized: the same precision may be one of several grids."""
    found = _said(points, lambda run: [note for note in run.notes if not note.startswith(EXTRAPOLATED)])
    lines = [f"- {kind}: {note}" for kind, note in found]
    return "## Graphs\n\n" + "\n".join(lines) if lines else ""


def _said(points: Sequence[Point], of: Callable[[Run], Sequence[str]]) -> list[tuple[str, str]]:
    """What the runs of each kind say, once: sparse ones of all sparsities are of a kind."""
    runs = [run for point in points for run in point.report.runs]
    kinds = [(run.name if run.dense else f"sparse {run.engine}-{run.precision}", run) for run in runs]
    return list(dict.fromkeys((kind, text) for kind, run in kinds for text in of(run) if text))


def _outputs_note(points: Sequence[Point]) -> str:
    """What the runs were held against before they were timed."""
    runs = [run for point in points for run in _made(point) if run.status == "ok"]
    references = [run.depth_check.reference for run in runs if run.depth_check]
    deep, others = references.count("torch"), sum(name != "torch" for name in references)
    held = sum(run.output_check is not None for run in runs)
    # Models that take turns in memory are loaded once more before they are timed.
    together = all(point.report.all_loaded for point in points)
    process = "the process that was timed" if together else "a process like the one that was timed"
    lines = [
        f"{held} of {len(runs)} timed runs were held against torch in fp32 (the weights before quantization) "
        f"at the beginning of the text, and {deep} at the timed depth too, in {process}.",
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
        for name in baselines(points) or [""]:
            compared, dense = point.report.speedup_over(run.name, name), point.run(name)
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
