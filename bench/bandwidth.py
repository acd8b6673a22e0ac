"""The read bandwidth of the memory, which bounds how fast a model can be decoded.

Run as a program of its own (`python bandwidth.py 0,1 1073741824`), pinned to the cores given, one
thread on each; prints bytes per second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

REPEATS = 5
FLOAT_BYTES = 4


def measure_bandwidth(cores: Sequence[int], cache_bytes: int, available_bytes: int) -> float:
    """Bytes read per second by `cores` at once, the best of some passes over more than the caches hold."""
    size = min(max(4 * cache_bytes, 256 << 20), 2 << 30, available_bytes // 4)
    # -I: this folder must not come before the standard library, which has a statistics.py too.
    command = [sys.executable, "-I", str(Path(__file__)), ",".join(map(str, cores)), str(size)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def _best_pass(cores: Sequence[int], size: int) -> float:
    """Bytes a second that threads on `cores` read at once, each from its own part of `size` bytes."""
    start, end = (threading.Barrier(len(cores) + 1) for _ in range(2))
    part = size // FLOAT_BYTES // len(cores)
    threads = [threading.Thread(target=_read, args=(core, part, start, end)) for core in cores]
    for thread in threads:
        thread.start()
    best = 0.0
    for _ in range(len(READS) * REPEATS):
        start.wait()
        began = time.perf_counter()
        end.wait()
        best = max(best, part * FLOAT_BYTES * len(cores) / (time.perf_counter() - began))
    for thread in threads:
        thread.join()
    return best


def _read(core: int, count: int, start: threading.Barrier, end: threading.Barrier) -> None:
    # Memory is on the NUMA node of the thread that first touches it. Ones, not zeros: untouched zero pages
    # would all be the same page.
    os.sched_setaffinity(0, [core])
    data = np.ones(count, dtype=np.float32)
    for read in READS:
        for _ in range(REPEATS):
            start.wait()
            read(data)
            end.wait()


def _largest(part: np.ndarray) -> object:
    return part.max()


def _self_product(part: np.ndarray) -> object:
    return np.dot(part, part)


READS = (_largest, _self_product)


if __name__ == "__main__":
    print(_best_pass([int(core) for core in sys.argv[1].split(",")], int(sys.argv[2])))
