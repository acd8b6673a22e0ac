"""Which dense graph is ONNX Runtime's best: block sizes, and one product for layers that share an input.

    python benchmarks/dense_baseline.py [--shape tinyllama-1.1b] [--precision int8,int4] [--cores 2]

Random weights of the real shape, GroupQueryAttention with shared buffers, runs of all graphs in turn. A
baseline that is not at its best is a straw man: the defaults of `dlp-deploy export --baseline` follow this.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.random_model import RandomModel
from dlp_deploy.bench.shapes import shape_config
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.export.onnxruntime import OnnxRuntimeTarget

CONTEXT, PROMPT, NEW_TOKENS = 512, 64, 32
BLOCKS = (32, 64, 128, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--blocks", type=int, help="decoder blocks of the shape; all, unless told")
    parser.add_argument("--precision", default="int8,int4")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    config, cores = shape_config(options.shape, options.blocks), choose_cores(options.cores)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, CONTEXT - NEW_TOKENS)
    engine = engine_named("onnxruntime")
    for precision in options.precision.split(","):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=".")))
            workers: dict[str, EngineWorker] = {}
            for joined in (False, True):
                OnnxRuntimeTarget.joins_linears = joined
                for block in BLOCKS if precision != "fp32" else BLOCKS[:1]:
                    name = f"block {block}, {'joined' if joined else 'apart'}"
                    graph = RandomModel(config, 0.0, 0, block).write(folder / name, "onnxruntime", precision)
                    worker = stack.enter_context(EngineWorker.spawn(engine, cores))
                    worker.load(graph.model, CONTEXT - 1, PROMPT, len(ids) - PROMPT)
                    shutil.rmtree(folder / name)
                    worker.generate(ids, NEW_TOKENS)
                    workers[name] = worker
            samples: dict[str, list[float]] = {name: [] for name in workers}
            for index in range(options.rounds):
                for name in list(workers)[:: 1 if index % 2 else -1]:
                    samples[name].append(float(np.median(workers[name].generate(ids, NEW_TOKENS).samples_ms)))
            times = {name: np.array(values) for name, values in samples.items()}
            first = next(iter(times.values()))
            for name, values in times.items():
                ratio = np.median(values / first)
                print(f"{precision}, {name}: {np.median(values):.2f} ms/token, {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
