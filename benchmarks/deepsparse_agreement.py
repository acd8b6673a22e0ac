"""The same graph in this bench and in deepsparse.benchmark, with the cache filled the same: do they agree?

    python benchmarks/deepsparse_agreement.py ARTIFACT [--precision int8] [--cores 2] [--context 512]

Both run in the same environment on the same cores, in turn. deepsparse.benchmark decodes the same token at
one depth, over and over; ours decodes tokens around that depth. Goal: within 5 %. Compiles twice per repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
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
CALL = "from deepsparse.benchmark.benchmark_model import main; main()"


def ours(model: Path, cores: Sequence[int], context: int, rounds: int = 3) -> float:
    """Median milliseconds per token of the last tokens of a context."""
    ids = np.resize(read_reference(model.parent).ids, context - NEW_TOKENS)
    with EngineWorker.spawn(ENGINE, cores) as worker:
        worker.load(model, context - 1, PROMPT)
        samples = [worker.generate(ids, NEW_TOKENS).samples_ms for _ in range(1 + rounds)]
    return float(np.median(samples[1:]))


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
        options += ["--num_kv_cache_tokens", context - NEW_TOKENS // 2, "-w", 3, "-q", "-x", result]
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=15)
    options = parser.parse_args()
    export = read_manifest(options.artifact).export_for(ENGINE.name, options.precision, dense=False)
    if export is None:
        parser.error(f"{options.artifact} has no {options.precision} graph for DeepSparse")
    model, cores = options.artifact / export.path / "model.onnx", choose_cores(options.cores)
    pairs = []
    for _ in range(options.repeats):
        pair = ours(model, cores, options.context), theirs(model, cores, options.context, options.seconds)
        print(f"ours {pair[0]:.3f} ms, deepsparse.benchmark {pair[1]:.3f} ms", flush=True)
        pairs.append(pair)
    ratio = float(np.median([one / other for one, other in pairs]))
    verdict = "within" if abs(ratio - 1) <= 0.05 else "beyond"
    print(f"median of {len(pairs)} paired ratios: {ratio:.3f} ({verdict} 5 %)")


if __name__ == "__main__":
    main()
