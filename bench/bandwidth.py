"""The read bandwidth of the memory, which bounds how fast a model can be decoded.

Run as a program of its own (`python bandwidth.py 0,1 1073741824`), pinned to the cores given, one
thread on each; prints bytes per second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

REPEATS = 5


def measure_bandwidth(cores: Sequence[int], cache_bytes: int, available_bytes: int) -> float:
    """Bytes read per second by `cores` at once, the best of some passes over more than the caches hold."""
    size = min(max(4 * cache_bytes, 256 << 20), 2 << 30, available_bytes // 4)
    # -I: this folder must not come before the standard library, which has a statistics.py too.
    command = [sys.executable, "-I", str(Path(__file__)), ",".join(map(str, cores)), str(size)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def _best_pass(cores: Sequence[int], size: int) -> float:
    # Ones, not zeros: untouched zero pages would all be the same page.
    data = np.ones(size // 4, dtype=np.float32)
    parts = np.array_split(data, len(cores))
    best = 0.0
    with ThreadPoolExecutor(len(cores)) as pool:
        for read in (_largest, _self_product):
            for _ in range(REPEATS):
                start = time.perf_counter()
                list(pool.map(_pinned, [read] * len(cores), cores, parts))
                best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def _pinned(read: Callable[[np.ndarray], object], core: int, part: np.ndarray) -> None:
    os.sched_setaffinity(0, [core])
    read(part)


def _largest(part: np.ndarray) -> object:
    return part.max()


def _self_product(part: np.ndarray) -> object:
    return np.dot(part, part)


if __name__ == "__main__":
    print(_best_pass([int(core) for core in sys.argv[1].split(",")], int(sys.argv[2])))
