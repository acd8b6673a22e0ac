"""The same graph in this bench and in deepsparse.benchmark, with the cache filled the same: do they agree?

    python benchmarks/deepsparse_agreement.py ARTIFACT [--precision int8] [--cores 2] [--context 512]

Both run in the same environment on the same cores. deepsparse.benchmark decodes the same token at one depth,
over and over; ours decodes the tokens around that depth. Machines that others use too change within seconds
by more than is compared here, so the two take turns of some two seconds: while ours decodes, the process of
deepsparse.benchmark is stopped (SIGSTOP), which spoils one of its samples per turn and leaves its median
alone. Goal: within 5 %. Both are compiled anew in every repeat: a minute and a half for the demo's model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import clean_environment, interpreter
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.export.reference import read_reference

ENGINE = engine_named("deepsparse")
PROMPT, NEW_TOKENS, BLOCK = 64, 64, 64
WARM_UP_S, TURN_S = 3, 2
CALL = "from deepsparse.benchmark.benchmark_model import main; main()"
STARTED = "performance measurements"


def pair(model: Path, cores: Sequence[int], context: int, seconds: int) -> tuple[float, float]:
    """Median milliseconds per token of the last tokens of a context, in ours and in deepsparse.benchmark."""
    ids = np.resize(read_reference(model.parent).ids, context - NEW_TOKENS)
    with (
        EngineWorker.spawn(ENGINE, cores) as worker,
        tempfile.TemporaryDirectory() as folder,
    ):
        worker.load(model, context - 1, PROMPT)
        samples: list[float] = []
        with deepsparse_benchmark(model, cores, context, seconds, Path(folder)) as process:
            # As long a warm-up as deepsparse.benchmark has; it is in its own at the first turn.
            decoded(worker, ids, WARM_UP_S)
            process.send_signal(signal.SIGCONT)
            time.sleep(WARM_UP_S)
            while process.poll() is None:
                process.send_signal(signal.SIGSTOP)
                samples += decoded(worker, ids, TURN_S)
                process.send_signal(signal.SIGCONT)
                time.sleep(TURN_S)
        theirs = json.loads(Path(folder, "result.json").read_text())["benchmark_result"]["median"]
        return float(np.median(samples)), float(theirs)


def decoded(worker: EngineWorker, ids: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of each token decoded in so many seconds."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        samples += worker.generate(ids, NEW_TOKENS).samples_ms
    return samples


@contextmanager
def deepsparse_benchmark(
    model: Path, cores: Sequence[int], context: int, seconds: int, folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """deepsparse.benchmark at the mean depth of our tokens, stopped where it has compiled the graph; it
    writes result.json into `folder`.

    It writes shapes into the graph, which is therefore a copy beside links to the weights. It counts the
    time in which it is stopped as its own, so it is told to run for both.
    """
    copy, result = folder / "model.onnx", folder / "result.json"
    shutil.copyfile(model, copy)
    (folder / "model.onnx.data").symlink_to(model.resolve().with_name("model.onnx.data"))
    length = BLOCK * -(-context // BLOCK)
    options = ["--sequence_length", length, "--input_ids_length", 1, "-ncores", len(cores)]
    options += ["--num_kv_cache_tokens", context - NEW_TOKENS // 2]
    options += ["-t", 2 * seconds, "-w", 2 * WARM_UP_S, "-x", result]
    with subprocess.Popen(
        [interpreter(ENGINE), "-c", CALL, copy, *map(str, options)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | {"OMP_NUM_THREADS": str(len(cores))},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ) as process:
        assert process.stderr is not None
        log = []
        while STARTED not in (log or [""])[-1]:
            log.append(process.stderr.readline())
            if not log[-1]:
                raise RuntimeError(f"deepsparse.benchmark ended early: {''.join(log)}")
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            if process.poll() is None:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=20)
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
