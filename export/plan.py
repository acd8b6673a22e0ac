"""Which graphs an artifact gets, from what the user asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from ..artifact import EngineName, Precision
from ..errors import UserError


@dataclass(frozen=True)
class Graph:
    """One graph to export, and the folder of the artifact that it goes to."""

    engine: EngineName
    precision: Precision
    dense: bool
    folder: str

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


def plan_graphs(quant: str, target: str, baseline: str) -> tuple[Graph, ...]:
    """Sparse graphs for each target in each precision, then dense baselines for ONNX Runtime.

    The first precision of `quant` is the artifact's own and goes to <engine>/, others to
    <engine>-<precision>/. `baseline` may be "none". Raises UserError for unknown names.
    """
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
        )
        for engine in engines
        for first, precision in ((precision == precisions[0], precision) for precision in precisions)
    ]
    names = () if baseline == "none" else split_list(baseline, get_args(Precision), "--baseline")
    dense = [Graph("onnxruntime", cast(Precision, name), True, f"baseline/{name}") for name in names]
    return (*sparse, *dense)
