"""Which graphs an artifact gets, from what the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from ..artifact import EngineName, Precision
from ..errors import UserError
from .quantize import Grid

Rounding = Literal["gptq", "nearest"]
# The finest and most accurate block of MatMulNBits.
BLOCK_SIZE = 32
BLOCK_SIZES = (16, 32, 64, 128, 256)


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

    @property
    def grid(self) -> Grid | None:
        """What the weights are rounded to; None for fp32."""
        if self.precision == "fp32":
            return None
        block = None if self.engine == "deepsparse" else self.block_size
        return Grid(8 if self.precision == "int8" else 4, block)

    @property
    def head_grid(self) -> Grid | None:
        """DeepSparse runs 4 bits at the speed of 8, so its head, which is not pruned, has 8. (With 4, most of
        its weights round to zero, and the engine's sparse kernel gets wide heads wrong for 64 tokens.)"""
        return Grid(8) if self.token_scales else self.grid

    @property
    def token_scales(self) -> bool:
        """Whether activations are int8 with one scale per token, which smoothing is for."""
        return self.engine == "deepsparse" and self.precision != "fp32"

    @property
    def calibrated(self) -> bool:
        """Whether rounding is chosen on text. 8 bits per block lose nothing to regain."""
        return self.rounding == "gptq" and (self.token_scales or self.precision == "int4")

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


def plan_graphs(
    quant: str,
    target: str,
    baseline: str,
    rounding: str = "gptq",
    block_size: int = BLOCK_SIZE,
    keep_fp32: str = "none",
) -> tuple[Graph, ...]:
    """Sparse graphs for each target in each precision, then dense baselines for ONNX Runtime.

    The first precision of `quant` is the artifact's own and goes to <engine>/, others to
    <engine>-<precision>/. `baseline` may be "none". Raises UserError for unknown names.
    """
    if rounding not in get_args(Rounding):
        raise UserError(f"--rounding {rounding} is not known; it takes: {', '.join(get_args(Rounding))}")
    if block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UserError(f"--block-size {block_size}: ONNX Runtime takes {sizes}")
    precisions = split_list(quant, get_args(Precision), "--quant")
    engines = split_list(target, get_args(EngineName), "--target")
    if not precisions or not engines:
        raise UserError(
            "--quant and --target each need at least one name; e.g. --quant int8 --target deepsparse"
        )
    sparse = [
        Graph(
            cast(EngineName, engine),
            cast(Precision, precision),
            False,
            engine if first else f"{engine}-{precision}",
            cast(Rounding, rounding),
            block_size,
            keep_fp32,
        )
        for engine in engines
        for first, precision in ((precision == precisions[0], precision) for precision in precisions)
    ]
    names = () if baseline == "none" else split_list(baseline, get_args(Precision), "--baseline")
    dense = [
        Graph(
            "onnxruntime",
            cast(Precision, name),
            True,
            f"baseline/{name}",
            cast(Rounding, rounding),
            block_size,
            keep_fp32,
        )
        for name in names
    ]
    return (*sparse, *dense)
