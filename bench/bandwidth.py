"""The read bandwidth of the memory, which bounds how fast a model can be decoded.

Run as a program of its own (`python -m dlp_deploy.bench.bandwidth 0,1 1073741824`), it reads so many bytes
with one thread on each of the cores given, and prints bytes per second.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .probe import ask

REPEATS = 5
# Threads wake one after the other, some tenths of a millisecond apart: beside a pass that is little.
READS_PER_PASS = 4
SMALLEST_PART = 64 << 20
FLOAT_BYTES = 4

Read = Callable[[np.ndarray], object]
Clock = Callable[[], float]


def measure_bandwidth(cores: Sequence[int], cache_bytes: int, available_bytes: int) -> float:
    """Bytes read per second by `cores` at once, the median of some passes over far more than the
    `cache_bytes` of their caches. Raises WorkerError where it cannot be measured."""
    (rate,) = ask(__name__, cores, str(buffer_bytes(len(cores), cache_bytes, available_bytes)))
    return rate


def buffer_bytes(cores: int, cache_bytes: int, available_bytes: int) -> int:
    """Bytes to read: four times what the caches hold, and enough for a long pass, if memory has room."""
    return min(max(4 * cache_bytes, SMALLEST_PART * cores, 256 << 20), available_bytes // 4)


def pass_rates(spans: np.ndarray, bytes_read: int) -> np.ndarray:
    """Bytes a second of each pass, float64 [passes], in which all threads together read `bytes_read`.

    `spans`, float64 [threads, passes, 2], are the seconds at which each thread began and ended: a pass lasts
    from the first that began to the last that ended.
    """
    return np.asarray(bytes_read / (spans[:, :, 1].max(axis=0) - spans[:, :, 0].min(axis=0)))


def rate_of_reading(
    cores: Sequence[int], size: int, reads: Sequence[Read], clock: Clock = time.perf_counter
) -> float:
    """Bytes a second that a thread on each of `cores` reads of its part of `size` bytes, all at once, in the
    fastest of these ways of reading, each of them at its median."""
    part = size // FLOAT_BYTES // len(cores)
    together = threading.Barrier(len(cores))
    with ThreadPoolExecutor(len(cores)) as pool:
        reading = [pool.submit(_read_part, core, part, together, reads, clock) for core in cores]
        spans = np.array([each.result() for each in reading])
    rates = pass_rates(spans, part * FLOAT_BYTES * len(cores) * READS_PER_PASS)
    return float(np.median(rates.reshape(len(reads), REPEATS), axis=1).max())


def _read_part(
    core: int, count: int, together: threading.Barrier, reads: Sequence[Read], clock: Clock
) -> list[tuple[float, float]]:
    try:
        # Memory is on the NUMA node of the thread that first touches it. Ones, not zeros: untouched zero
        # pages would all be the same page.
        os.sched_setaffinity(0, [core])
        data = np.ones(count, dtype=np.float32)
        return [_pass(read, data, together, clock) for read in reads for _ in range(REPEATS)]
    except BaseException:
        # The others would wait for ever.
        together.abort()
        raise


def _pass(read: Read, data: np.ndarray, together: threading.Barrier, clock: Clock) -> tuple[float, float]:
    """When this thread began, and when it ended."""
    together.wait()
    began = clock()
    for _ in range(READS_PER_PASS):
        read(data)
    return began, clock()


def _largest(part: np.ndarray) -> object:
    return part.max()


def _self_product(part: np.ndarray) -> object:
    return np.dot(part, part)


READS = (_largest, _self_product)


if __name__ == "__main__":
    print(rate_of_reading([int(core) for core in sys.argv[1].split(",")], int(sys.argv[2]), READS))
