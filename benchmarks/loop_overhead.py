"""How much the measuring loop adds to the engine's own time per token.

    python benchmarks/loop_overhead.py ARTIFACT [--cores 2] [--context 512] [--new-tokens 64] [--rounds 5]

The bench times everything between two tokens: filling the inputs, the engine, the arg max. Here the engine's
own call is timed inside of that, in the same tokens. Goal: at most 3 % more. A minute or two per graph.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.plan import Candidate, plan_runs
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.export.reference import read_reference

WORKER = Path(__file__).with_name("timed_engine.py")
PROMPT = 64


def overhead(candidate: Candidate, options: argparse.Namespace, times: Path) -> tuple[float, float]:
    """Median milliseconds per token as the bench times it, and of the engine's call alone."""
    os.environ |= {"TIMED_ENGINE": candidate.engine.worker, "TIMED_FILE": str(times)}
    engine = replace(candidate.engine, worker=str(WORKER))
    ids = np.resize(read_reference(candidate.reference).ids, options.context - options.new_tokens)
    whole, own = [], []
    with EngineWorker.spawn(engine, choose_cores(options.cores)) as worker:
        worker.load(candidate.model, options.context, PROMPT, fill=len(ids) - PROMPT)
        for _ in range(1 + options.rounds):
            whole.append(worker.generate(ids, options.new_tokens).samples_ms)
            worker.restart()
            own.append(json.loads(times.read_text(encoding="utf-8"))[1 - options.new_tokens :])
    if not own[-1]:
        raise SystemExit(
            f"{candidate.name}: timed_engine.py does not know which calls of its engine do the work"
        )
    # The first round warms up.
    return float(np.median(whole[1:])), float(np.median(own[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--engine", default="deepsparse,onnxruntime")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs = plan_runs(options.artifact, read_manifest(options.artifact), options.engine, None)
    print("| run | ms/token | engine alone | added |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            whole, own = overhead(run, options, Path(folder) / "times.json")
            print(f"| {run.name} | {whole:.3f} | {own:.3f} | {whole / own - 1:.1%} |", flush=True)


if __name__ == "__main__":
    main()
