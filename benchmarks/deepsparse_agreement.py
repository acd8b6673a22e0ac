"""The same graph in this bench and in deepsparse.benchmark, with the cache filled the same: do they agree?

    python benchmarks/deepsparse_agreement.py ARTIFACT [--precision int8] [--cores 2] [--context 512]

Both run in the same environment on the same cores. deepsparse.benchmark decodes the same token at one depth,
over and over; ours decodes tokens around that depth, for half of the time before it and for half after it,
so that a machine that grows slower or faster does so for both. Goal: within 5 %. Compiles both anew in every
repeat: a minute and a half for the demo's model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import clean_environment, interpreter
from dlp_deploy.bench.machine import choose_cores
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.export.reference import read_reference

ENGINE = engine_named("deepsparse")
PROMPT, NEW_TOKENS, BLOCK = 64, 64, 64
WARM_UP_S = 3
CALL = "from deepsparse.benchmark.benchmark_model import main; main()"


def pair(model: Path, cores: Sequence[int], context: int, seconds: int) -> tuple[float, float]:
    """Median milliseconds per token of the last tokens of a context, in ours and in deepsparse.benchmark."""
    ids = np.resize(read_reference(model.parent).ids, context - NEW_TOKENS)
    with EngineWorker.spawn(ENGINE, cores) as worker:
        worker.load(model, context - 1, PROMPT)
        before = ours(worker, ids, seconds / 2)
        other = theirs(model, cores, context, seconds)
        return float(np.median(before + ours(worker, ids, seconds / 2))), other


def ours(worker: EngineWorker, ids: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of each token, after as long a warm-up as deepsparse.benchmark has."""
    decoded(worker, ids, WARM_UP_S)
    return decoded(worker, ids, seconds)


def decoded(worker: EngineWorker, ids: np.ndarray, seconds: float) -> list[float]:
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        samples += worker.generate(ids, NEW_TOKENS).samples_ms
    return samples


def theirs(model: Path, cores: Sequence[int], context: int, seconds: int) -> float:
    """Median milliseconds of deepsparse.benchmark at the mean depth of our tokens.

    It writes shapes into the graph, which is therefore a copy beside links to the weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy, result = Path(folder, "model.onnx"), Path(folder, "result.json")
        shutil.copyfile(model, copy)
        Path(folder, "model.onnx.data").symlink_to(model.resolve().with_name("model.onnx.data"))
        length = BLOCK * -(-context // BLOCK)
        options = ["--sequence_length", length, "--input_ids_length", 1, "-ncores", len(cores), "-t", seconds]
        options += ["--num_kv_cache_tokens", context - NEW_TOKENS // 2, "-w", WARM_UP_S, "-q", "-x", result]
        subprocess.run(
            [interpreter(ENGINE), "-c", CALL, copy, *map(str, options)],
            check=True,
            capture_output=True,
            env=clean_environment() | {"OMP_NUM_THREADS": str(len(cores))},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        return float(json.loads(result.read_text())["benchmark_result"]["median"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=15)
    options = parser.parse_args()
    export = read_manifest(options.artifact).export_for(ENGINE.name, options.precision, dense=False)
    if export is None:
        parser.error(f"{options.artifact} has no {options.precision} graph for DeepSparse")
    model, cores = options.artifact / export.path / "model.onnx", choose_cores(options.cores)
    pairs = []
    for _ in range(options.repeats):
        pairs.append(pair(model, cores, options.context, options.seconds))
        print("ours {:.3f} ms, deepsparse.benchmark {:.3f} ms".format(*pairs[-1]), flush=True)
    ratio = float(np.median([one / other for one, other in pairs]))
    verdict = "within" if abs(ratio - 1) <= 0.05 else "beyond"
    print(f"median of {len(pairs)} paired ratios: {ratio:.3f} ({verdict} 5 %)")


if __name__ == "__main__":
    main()
