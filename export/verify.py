"""Checks that decide whether an exported graph may have its final name.

Structure (onnx.checker), zeros (every pruned weight is still exactly zero), and logits: the graph is
run over a prompt and then token by token through its KV cache, and compared with torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from ..artifact import OutputCheck
from ..bench.engines import Engine
from ..bench.worker import EngineWorker, WorkerError
from ..errors import UserError
from ..families import Decoder, Outline
from ..gguf_header import read_header
from ..gguf_model import gguf_tensors
from ..progress import Advance
from .decoder import Weights, layers_of
from .graph import DATA_FILE
from .loadable import require_loadable

# Float32 graphs differ from torch by the order of sums only. A max_rel_error above this is a wrong graph.
FP32_MAX_ERROR = 1e-4
# Quantized ones differ by what the coarser grid does to the logits, so their mean_rel_error counts. That of
# SmolLM2-135M, pruned to 70 %, is 0.006 to 0.016 in int8 and 0.02 to 0.07 in int4.
MEAN_ERROR = {"int8": 0.05, "int4": 0.15}
# Two right engines differ on one quantized graph almost as much as each from torch, because rounding of
# activations amplifies the last bit of whatever came before. So an engine is held to the mean error of
# ONNX Runtime on that graph; one that computes something else is several times beyond.
ENGINE_RATIO = 1.5

PLAIN_ONNXRUNTIME = Engine(
    name="onnxruntime",
    title="ONNX Runtime, any graph",
    worker=str(Path(__file__).with_name("plain_session.py")),
    reads="",
    precisions=("fp32", "int8", "int4"),
    licence="MIT",
    modules=("onnxruntime",),
)


class VerificationError(Exception):
    """An exported graph is not what the checkpoint says. Not the user's fault; nothing is published."""


@dataclass(frozen=True)
class ZeroCount:
    """Block weights of a graph: how many there are, pruned in the checkpoint, and zero in the graph."""

    weights: int
    pruned: int
    zeros: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights

    @property
    def rounded_to_zero(self) -> float:
        return (self.zeros - self.pruned) / self.weights


def check_structure(model: Path, engine: str) -> None:
    """Run onnx.checker on the graph with its external data, and ask whether `engine` reads its operator set
    and format. Raises VerificationError."""
    try:
        onnx.checker.check_model(str(model))
        require_loadable(model, engine)
    except (onnx.checker.ValidationError, ValueError, UserError) as error:
        raise VerificationError(f"{model}: {error}") from None


def count_zeros(model: Path, weights: Weights, decoder: Outline, with_head: bool = False) -> ZeroCount:
    """Compare the stored integers or floats with the checkpoint, layer by layer; `with_head`, also that of
    the head, though what is counted are block weights.

    Raises VerificationError naming the layer in which a pruned weight is not exactly zero.
    """
    groups = decoder.linear_groups()
    expected = {layer for group in (groups if with_head else groups[:-1]) for layer in group}
    total = pruned = zeros = 0
    found = _gguf_zeros if model.suffix == ".gguf" else _onnx_zeros
    for layer, graph_zero, source_zero in found(model, weights, decoder, frozenset(expected)):
        lost = int(np.count_nonzero(source_zero & ~graph_zero))
        if lost:
            raise VerificationError(f"{model}: {lost} pruned weights of {layer} are no longer zero")
        expected.discard(layer)
        if layer == decoder.family.head:
            continue
        total += source_zero.size
        pruned += int(source_zero.sum())
        zeros += int(graph_zero.sum())
    if expected:
        raise VerificationError(f"{model}: it has no weight for {min(expected)}")
    return ZeroCount(total, pruned, zeros)


def _gguf_zeros(
    model: Path, weights: Weights, decoder: Outline, expected: frozenset[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    assert isinstance(decoder, Decoder)
    # Headers are remembered by path, and this file is new.
    read_header.cache_clear()
    for tensor in gguf_tensors(model, decoder):
        layer, _, kind = tensor.name.rpartition(".")
        if kind == "weight" and layer in expected:
            yield layer, tensor.read().numpy() == 0, weights.zeros(layer)


def _onnx_zeros(
    model: Path, weights: Weights, _decoder: Outline, expected: frozenset[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    graph = onnx.load(str(model), load_external_data=False).graph
    bits = {
        node.input[1]: next(entry.i for entry in node.attribute if entry.name == "bits")
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    for tensor in graph.initializer:
        layers = layers_of(tensor.name.removesuffix(".weight"))
        if tensor.name.endswith(".weight") and expected.issuperset(layers):
            stored = _stored(tensor, model.parent)
            yield from _zeros_of_layers(stored, bits.get(tensor.name), weights, layers)


def _zeros_of_layers(
    stored: np.ndarray, bits: int | None, weights: Weights, layers: Sequence[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Layer by layer of those stored as one: the zeros of the graph and of the checkpoint, [out, in]."""
    sources = [weights.zeros(layer) for layer in layers]
    rows, inputs = sum(len(source) for source in sources), sources[0].shape[1]
    graph_zero = _zeros(stored, bits, (rows, inputs))
    ends = np.cumsum([len(source) for source in sources])
    yield from zip(layers, np.split(graph_zero, ends[:-1]), sources, strict=True)


def _stored(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """The values of an initializer. Read, not mapped: mapped pages of all of them would count as memory."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count, start = int(place["length"]) // dtype.itemsize, int(place["offset"])
    return np.fromfile(folder / DATA_FILE, dtype, count, offset=start).reshape(tuple(tensor.dims))


def _zeros(stored: np.ndarray, bits: int | None, shape: tuple[int, int]) -> np.ndarray:
    """Which weights [out, in] are zero, for MatMul [in, out], or for MatMulNBits of so many bits, packed
    [out, blocks, bytes]."""
    if bits is None:
        return stored.T == 0
    out, inputs = shape
    levels = stored.reshape(out, -1)
    if bits == 4:
        levels = np.stack((levels & 15, levels >> 4), axis=-1).reshape(out, -1)
    return levels[:, :inputs] == 1 << (bits - 1)


def compare_logits(engine: str, against: str, logits: np.ndarray, expected: np.ndarray) -> OutputCheck:
    """Agreement of float32 logits [positions, vocabulary]; a nan counts as an infinite error."""
    difference = np.abs(logits - expected)
    peak = float(np.abs(expected).max())
    errors = (float(difference.max()) / peak, float(difference.mean()) / peak)
    largest, mean = (error if np.isfinite(error) else float("inf") for error in errors)
    return OutputCheck(
        engine=engine,
        reference="torch" if against == "torch" else "onnxruntime",
        max_rel_error=largest,
        mean_rel_error=mean,
        greedy_match=float((logits.argmax(-1) == expected.argmax(-1)).mean()),
        positions=len(expected),
    )


def require_agreement(checks: Sequence[OutputCheck], precision: str, model: Path) -> None:
    """Raise VerificationError when the logits of an engine differ from torch by more than its precision
    explains, or by more than those of ONNX Runtime on the same graph explain."""
    of_torch = [check for check in checks if check.reference == "torch"]
    ours = next((check.mean_rel_error for check in of_torch if check.engine == "onnxruntime"), None)
    for check in of_torch:
        if precision == "fp32":
            kind, error, limit = "largest", check.max_rel_error, FP32_MAX_ERROR
        else:
            kind, error, limit = "mean", check.mean_rel_error, MEAN_ERROR[precision]
            if ours is not None and check.engine != "onnxruntime":
                limit = min(limit, ENGINE_RATIO * ours)
        if not error <= limit:
            raise VerificationError(
                f"{model}: the {kind} error of its logits in {check.engine} is {error:.2e} of the largest of "
                f"torch (limit for {precision}: {limit:.1e})"
            )


def graph_logits(model: Path, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Logits of any of our graphs in ONNX Runtime, float32 [len(ids) - prompt + 1, vocabulary].

    ids int64 [n]: the first `prompt` are fed at once, the others one by one through the KV cache.
    """
    return engine_logits(PLAIN_ONNXRUNTIME, model, ids, prompt)


def engine_logits(
    engine: Engine, model: Path, ids: np.ndarray, prompt: int, advance: Advance | None = None
) -> np.ndarray:
    """The same in any engine, in a process of its own: memory and aborts are the worker's. `advance` is
    called behind each row.

    Raises VerificationError when the engine cannot run the graph.
    """
    try:
        with EngineWorker.spawn(engine, sorted(os.sched_getaffinity(0))) as worker:
            worker.load(model, context=len(ids), prompt=prompt)
            return worker.logits(ids, prompt, advance)
    except WorkerError as error:
        raise VerificationError(f"{model}: {error}") from error
