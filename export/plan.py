"""Which graphs an artifact gets, from what the user asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

from ..artifact import Activations, EngineName, Precision
from ..bench.engines import engine_named
from ..bench.environments import interpreter
from ..errors import UserError
from .grid import Grid

Rounding = Literal["gptq", "nearest"]
# A fine block of MatMulNBits, which is accurate, and its fastest: what is compared with must be at its best.
BLOCK_SIZE, BASELINE_BLOCK_SIZE = 32, 128
BLOCK_SIZES = (16, 32, 64, 128, 256)
# Inputs that share a scale in llama.cpp's Q8_0 and Q4_0.
GGUF_BLOCK = 32
# Engines that dense baselines run in; the first is meant where none is named.
BASELINE_ENGINES: tuple[EngineName, ...] = ("onnxruntime", "llamacpp")


@dataclass(frozen=True)
class Graph:
    """One graph to export, and the folder of the artifact that it goes to."""

    engine: EngineName
    precision: Precision
    dense: bool
    folder: str
    rounding: Rounding = "gptq"
    block_size: int = BLOCK_SIZE
    # Layers that stay fp32: "none", "auto" (by measurement), or patterns of names.
    keep_fp32: str = "none"
    # What sets the scale of int8 activations: each token, or a text, once for all.
    activations: Activations = "dynamic"
    # Whether outliers of int8 activations are moved into the weights first.
    smooth: bool = True

    @property
    def grid(self) -> Grid | None:
        """What the weights are rounded to; None for fp32."""
        if self.precision == "fp32":
            return None
        block = {"deepsparse": None, "llamacpp": GGUF_BLOCK}.get(self.engine, self.block_size)
        return Grid(8 if self.precision == "int8" else 4, block)

    @property
    def head_grid(self) -> Grid | None:
        """DeepSparse runs 4 bits at the speed of 8, so its head, which is seldom pruned, has 8. (With 4, most
        of its weights round to zero, and the engine's sparse kernel gets wide heads wrong for 64 tokens.)"""
        return Grid(8) if self.int8_inputs else self.grid

    @property
    def in_blocks(self) -> bool:
        """Whether so many inputs as `block_size` says share a scale."""
        return self.engine == "onnxruntime" and self.precision != "fp32"

    @property
    def int8_inputs(self) -> bool:
        """Whether linear layers read int8 activations, which smoothing is for."""
        return self.engine == "deepsparse" and self.precision != "fp32"

    @property
    def calibrated(self) -> bool:
        """Whether rounding is chosen on text. 8 bits per block lose nothing to regain."""
        return self.rounding == "gptq" and (self.int8_inputs or self.precision == "int4")

    @property
    def reads_text(self) -> bool:
        """Whether anything is measured on text: rounding, smoothing and scales, or which layers stay fp32."""
        measured_inputs = self.int8_inputs and (self.smooth or self.activations == "static")
        quantized = self.grid is not None
        return quantized and (self.calibrated or measured_inputs or self.keep_fp32 == "auto")

    @property
    def label(self) -> str:
        return f"{self.engine} {self.precision} {'dense' if self.dense else 'sparse'}"


def split_list(text: str, allowed: Sequence[str], option: str) -> tuple[str, ...]:
    """The comma-separated names of `text`, each once. Raises UserError for one not in `allowed`."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} {name} is not known; it takes: {', '.join(allowed)}")
    return names


def split_baselines(text: str) -> tuple[str, ...]:
    """The names of dense baselines in `text`: a precision (in ONNX Runtime) or llamacpp-<precision>; () for
    "none". Raises UserError for others."""
    known = [
        baseline_name(engine, precision) for engine in BASELINE_ENGINES for precision in get_args(Precision)
    ]
    return () if text == "none" else split_list(text, known, "--baseline")


def baseline_name(engine: str, precision: str) -> str:
    """What a dense baseline is called by --baseline, and its folder below baseline/."""
    return precision if engine == BASELINE_ENGINES[0] else f"{engine}-{precision}"


def baseline_of(name: str) -> tuple[EngineName, Precision]:
    """Engine and precision of a dense baseline."""
    engine, _, precision = name.rpartition("-")
    return cast(EngineName, engine or BASELINE_ENGINES[0]), cast(Precision, precision)


def plan_graphs(
    quant: str,
    target: str,
    baseline: str,
    rounding: str = "gptq",
    block_size: int | None = None,
    keep_fp32: str = "none",
    activations: str = "dynamic",
    smooth: bool = True,
) -> tuple[Graph, ...]:
    """Sparse graphs for each target in each precision, then dense baselines.

    The first precision of `quant` is the artifact's own and goes to <engine>/, others to
    <engine>-<precision>/. With target "none" there are baselines only, which are as `split_baselines`
    takes them. Baselines are quantized whole: `keep_fp32` would slow down what sparsity is compared with.
    Raises UserError for unknown names, and for options that mean nothing to any of the graphs.
    """
    for option, name, kind in (("rounding", rounding, Rounding), ("activations", activations, Activations)):
        if name not in get_args(kind):
            raise UserError(f"--{option} {name} is not known; it takes: {', '.join(get_args(kind))}")
    if block_size not in (None, *BLOCK_SIZES):
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"--block-size {block_size}: ONNX Runtime takes {sizes}")
    precisions = split_list(quant, get_args(Precision), "--quant")
    engines = () if target == "none" else split_list(target, get_args(EngineName), "--target")
    if not precisions or not (engines or target == "none"):
        raise UserError(
            "--quant and --target each need at least one name; e.g. --quant int8 --target deepsparse"
        )
    checked: Any = {"rounding": rounding, "activations": activations, "smooth": smooth}
    make: Callable[..., Graph] = partial(Graph, **checked)
    own, dense_block = block_size or BLOCK_SIZE, block_size or BASELINE_BLOCK_SIZE
    sparse = [
        make(
            engine,
            precision,
            False,
            engine if precision == precisions[0] else f"{engine}-{precision}",
            block_size=own,
            keep_fp32=keep_fp32,
        )
        for engine in engines
        for precision in precisions
    ]
    for option, given in (("--activations static", activations == "static"), ("--no-smooth", not smooth)):
        if given and not any(graph.int8_inputs for graph in sparse):
            raise UserError(
                f"{option} means nothing for --target {target} --quant {quant}: "
                "only DeepSparse's int8 and int4 graphs scale activations themselves"
            )
    if keep_fp32 != "none" and not any(graph.grid for graph in sparse):
        raise UserError(
            "--keep-fp32 is for quantized sparse graphs, of which there is none; "
            "dense baselines are quantized whole"
        )
    dense = [
        make(*baseline_of(name), True, f"baseline/{name}", block_size=dense_block)
        for name in split_baselines(baseline)
    ]
    if not sparse and not dense:
        raise UserError("--target none and --baseline none leave nothing to export")
    if block_size and not any(graph.in_blocks for graph in (*sparse, *dense)):
        raise UserError(
            f"--block-size {block_size} is for ONNX Runtime's int8 and int4 graphs, of which there is none"
        )
    return (*sparse, *dense)


def require_engines(graphs: Sequence[Graph]) -> None:
    """Raise UserError where graphs can only be checked in an engine that is not installed: llama.cpp."""
    for graph in graphs:
        if graph.engine == "llamacpp":
            interpreter(engine_named(graph.engine))
