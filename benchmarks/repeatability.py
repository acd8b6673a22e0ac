"""Does the same bench say the same again? The intervals of the speed-ups of consecutive runs should overlap.

    python benchmarks/repeatability.py ARTIFACT [--times 11] [--cores 2] [--engine deepsparse]

Goal: at least 9 of 10 pairs of runs in a row overlap, for every speed-up of a sparse run.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from dlp_deploy import bench
from dlp_deploy.bench.report import Comparison, Report, read_report


def overlap(one: Comparison, other: Comparison) -> bool:
    """Whether two intervals do; one round has none, which claims nothing and so contradicts nothing."""
    if one.ci95 is None or other.ci95 is None:
        return True
    return one.ci95[0] <= other.ci95[1] and other.ci95[0] <= one.ci95[1]


def agreement(reports: list[Report]) -> str:
    """A table of the speed-ups of sparse runs: their range, and how many pairs overlap."""
    lines = ["| run | baseline | speed-ups | pairs that overlap |", "| --- | --- | --- | ---: |"]
    for first in reports[0].comparisons:
        found = [report.speedup_over(first.run, first.baseline) for report in reports]
        known = [comparison for comparison in found if comparison]
        if reports[0].run(first.run).dense or len(known) < 2:
            continue
        pairs = [overlap(*pair) for pair in pairwise(known)]
        values = [comparison.speedup for comparison in known]
        spread = f"{min(values):.2f}x to {max(values):.2f}x"
        lines.append(f"| {first.run} | {first.baseline} | {spread} | {sum(pairs)} of {len(pairs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--times", type=int, default=11)
    parser.add_argument("--engine", default="deepsparse")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("repeatability"))
    options = parser.parse_args()
    reports = []
    for number in range(options.times):
        path = options.output / f"{number:02}" / "report.json"
        if not path.exists():
            bench(
                options.artifact,
                engine=options.engine,
                cores=options.cores,
                repeats=options.repeats,
                eval_windows=0,
                output=path,
            )
        reports.append(read_report(path))
        if number:
            print(agreement(reports), flush=True)


if __name__ == "__main__":
    main()
