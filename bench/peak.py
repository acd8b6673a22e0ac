"""The processor's peak rate of matrix products in fp32 and int8: the other roof over every run.

Run as a program of its own (`python -m dlp_deploy.bench.peak 0,1`), pinned to the cores given, one thread on
each; prints operations (a multiplication or an addition) per second in fp32 and in int8.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from .probe import ask

# Large enough to be bound by arithmetic, small enough for a fraction of a second.
ROWS, INNER, COLUMNS = 512, 2048, 2048
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """Operations per second of all cores together."""

    fp32: float
    int8: float


def measure_peak(cores: Sequence[int]) -> Peak:
    """The best rates that ONNX Runtime's matrix products reach on `cores`: a roof that software reaches,
    lower than what the data sheet multiplies out to. Raises WorkerError where they cannot be measured."""
    fp32, int8 = ask(__name__, cores)
    return Peak(fp32, int8)


def _best_rate(operator: str, left: np.ndarray, right: np.ndarray, threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        _product(operator, left, right), options, providers=["CPUExecutionProvider"]
    )
    operations = 2 * left.shape[0] * right.shape[0] * right.shape[1]
    best = 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        session.run(None, {"left": left})
        best = max(best, operations / (time.perf_counter() - start))
    return best


def _product(operator: str, left: np.ndarray, right: np.ndarray) -> bytes:
    """A model of one product by a constant, which the runtime packs once."""
    dtypes = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in (left, right)]
    result = TensorProto.FLOAT if operator == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, ["left", "right"], ["product"])],
        "peak",
        [helper.make_tensor_value_info("left", dtypes[0], left.shape)],
        [helper.make_tensor_value_info("product", result, (left.shape[0], right.shape[1]))],
        [helper.make_tensor("right", dtypes[1], right.shape, right.tobytes(), raw=True)],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()


def _print_rates(cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    random = np.random.default_rng(0)
    rows = ROWS * len(cores)
    right = random.integers(-127, 128, (INNER, COLUMNS), dtype=np.int8)
    left = random.integers(0, 256, (rows, INNER), dtype=np.uint8)
    fp32 = _best_rate("MatMul", left.astype(np.float32), right.astype(np.float32), len(cores))
    print(fp32, _best_rate("MatMulInteger", left, right, len(cores)))


if __name__ == "__main__":
    _print_rates([int(core) for core in sys.argv[1].split(",")])
