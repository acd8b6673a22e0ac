"""The speed-ups that sparse int8 should reach in DeepSparse, measured on a real shape with random weights.

    python benchmarks/speed_goals.py [--shape tinyllama-1.1b] [--context 512] [--cores 2]

Goals: at 70 % sparsity 5x dense fp32, 1.5x dense int8 and 1.1x dense int4 in ONNX Runtime; at 80 % 6x dense
fp32 and 1.25x dense int4. Where one is missed, the share of the machine's roofs says what limits it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dlp_deploy.bench.markdown import markdown_table
from dlp_deploy.bench.points import Point
from dlp_deploy.bench.summary import interval
from dlp_deploy.bench.sweep import sweep

GOALS = {0.7: {"fp32": 5.0, "int8": 1.5, "int4": 1.1}, 0.8: {"fp32": 6.0, "int4": 1.25}}
HEADINGS = ("sparsity", "over dense", "goal", "reached", "95% interval", "", "sparse run", "dense run")


def rows(point: Point) -> list[list[str]]:
    found = []
    for precision, goal in GOALS.get(point.sparsity, {}).items():
        baseline = f"onnxruntime-{precision}-dense"
        comparison = point.report.speedup_over(point.sparse.name, baseline)
        if comparison is None:
            found.append(
                [f"{point.sparsity:.0%}", precision, f"{goal:g}x", "not timed", "-", "missed", "-", "-"]
            )
            continue
        verdict = "reached" if comparison.speedup >= goal else "missed"
        limits = [share(point, name) for name in (point.sparse.name, baseline)]
        values = [f"{goal:g}x", f"{comparison.speedup:.2f}x", interval(comparison), verdict]
        found.append([f"{point.sparsity:.0%}", precision, *values, *limits])
    return found


def share(point: Point, name: str) -> str:
    run = point.report.run(name)
    if run.roofline is None or run.tpot_ms is None:
        return "-"
    found = max(run.roofline.bandwidth_share, run.roofline.compute_share or 0)
    return f"{run.tpot_ms.p50:.2f} ms, {found:.0%} of {run.roofline.bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cores", type=int)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    points = sweep(sparsity="0.7,0.8", quant="int8", **options)
    print(markdown_table(HEADINGS, [row for point in points for row in rows(point)]))
    for point in points:
        for warning in point.report.warnings:
            print(f"Note ({point.sparsity:.0%}): {warning}")


if __name__ == "__main__":
    main()
