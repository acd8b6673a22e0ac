"""What a sweep measures: which models, with how many of their blocks, and the room that they take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from ..artifact import EngineName, Precision
from ..errors import UserError
from ..export.plan import BLOCK_SIZES, baseline_of, split_list
from ..families import decoder_of
from .cgroups import available_memory
from .cores import choose_cores
from .engines import engine_named, has_room
from .environments import interpreter
from .machine import require_avx2
from .outcome import Workload, check_lengths, check_time_limit, text_lengths, usual_context
from .random_model import RandomModel, graph_bytes
from .shapes import SHAPES, shape_config
from .worker import TIME_LIMIT_S

# A model that memory does not hold is measured with as many of these as it does, and half as many: the more
# blocks, the less is noise multiplied.
LIMITED_BLOCKS = (16, 8, 4, 2)


@dataclass(frozen=True)
class PlannedModel:
    """One model to report: the engine that runs it, and the counts of decoder blocks to measure."""

    name: str
    engine: EngineName
    precision: Precision
    sparsity: float
    dense: bool
    counts: tuple[int, ...]

    def measured_name(self, count: int) -> str:
        return self.name if len(self.counts) == 1 else f"{self.name}-{count}-blocks"


@dataclass(frozen=True)
class SweepPlan:
    shape: str
    sparsities: tuple[float, ...]
    quants: tuple[Precision, ...]
    engine: EngineName
    # Names as --baseline takes them: fp32, llamacpp-int8.
    baselines: tuple[str, ...]
    blocks: int | None
    block_size: int
    seed: int
    workload: Workload
    memory: int = field(default_factory=available_memory)

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 2:
            raise UserError(f"--blocks {self.blocks}: extrapolation needs 2 or more")
        require_avx2()
        if self.block_size not in BLOCK_SIZES:
            raise UserError(
                f"--block-size {self.block_size}: ONNX Runtime takes {', '.join(map(str, BLOCK_SIZES))}"
            )
        for name in {self.engine, "onnxruntime", *(baseline_of(name)[0] for name in self.baselines)}:
            interpreter(engine_named(name))

    @cached_property
    def total(self) -> int:
        return decoder_of(shape_config(self.shape)).blocks

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree for two points to be of one sweep; how long a worker may be silent need not."""
        workload = self.workload
        return {
            "shape": self.shape,
            "engine": self.engine,
            "baseline": ",".join(self.baselines) or "none",
            "blocks": self.blocks,
            "block_size": self.block_size,
            "cores": len(workload.cores),
            "prompt_tokens": workload.prompt_tokens,
            "new_tokens": workload.new_tokens,
            "context": workload.context,
            "repeats": workload.repeats,
            "seed": self.seed,
            **_named_by_content(self.shape),
        }

    def model(self, count: int, sparsity: float) -> RandomModel:
        return RandomModel(shape_config(self.shape, count), sparsity, self.seed, self.block_size)

    def baseline_models(self) -> list[PlannedModel]:
        return [
            self._planned(f"{engine}-{precision}-dense", engine, precision, 0.0, dense=True)
            for engine, precision in map(baseline_of, self.baselines)
        ]

    def sparse_model(self, quant: Precision, sparsity: float) -> PlannedModel:
        return self._planned(
            point_name(self.engine, quant, sparsity), self.engine, quant, sparsity, dense=False
        )

    def _planned(
        self, name: str, engine: EngineName, precision: Precision, sparsity: float, dense: bool
    ) -> PlannedModel:
        limit = self.blocks or self._most_blocks(engine, precision)
        return PlannedModel(name, engine, precision, sparsity, dense, block_counts(limit, self.total))

    def _most_blocks(self, engine: EngineName, precision: Precision) -> int:
        """All blocks where memory holds them, or else the most of LIMITED_BLOCKS that it does."""
        for count in (self.total, *LIMITED_BLOCKS):
            if has_room(engine_named(engine), self._bytes(count, engine, precision), self.memory):
                return count
        return LIMITED_BLOCKS[-1]

    def _bytes(self, count: int, engine: EngineName, precision: Precision) -> int:
        return graph_bytes(shape_config(self.shape, count), engine, precision, self.block_size)

    def disk_bytes(self) -> int:
        """Most that the graphs take at a time: all baselines, and the largest point."""

        def size(model: PlannedModel) -> int:
            return sum(self._bytes(count, model.engine, model.precision) for count in model.counts)

        largest = max(size(self.sparse_model(quant, 0.0)) for quant in self.quants)
        return largest + sum(size(model) for model in self.baseline_models())


def _named_by_content(shape: str) -> dict[str, str]:
    """Of a folder what its config.json holds, which may be another one by the next sweep."""
    if shape in SHAPES:
        return {}
    return {"config_sha256": hashlib.sha256((Path(shape) / "config.json").read_bytes()).hexdigest()}


def point_name(engine: str, quant: str, sparsity: float) -> str:
    return f"{engine}-{quant}-s{100 * sparsity:g}"


def block_counts(limit: int | None, total: int) -> tuple[int, ...]:
    """How many of `total` decoder blocks to measure: all of them, or two counts to extrapolate from."""
    return (total,) if limit is None or limit >= total else (limit // 2, limit)


def parse_sparsities(text: str) -> tuple[float, ...]:
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        values = ()
    if not values or not all(0 <= value < 1 for value in values):
        raise UserError(f"--sparsity {text}: give numbers in [0, 1), separated by commas")
    return values


def parse_precisions(text: str, option: str) -> tuple[Precision, ...]:
    """The comma-separated precisions of `text`, at least one. UserError for what is none."""
    found = cast(tuple[Precision, ...], split_list(text, get_args(Precision), option))
    if not found:
        raise UserError(f"{option} is empty; it takes: {', '.join(get_args(Precision))}")
    return found


def parse_engine(name: str) -> EngineName:
    """An engine that graphs are written for. Raises UserError for another."""
    engine_named(name)
    if name not in get_args(EngineName):
        raise UserError(
            f"--engine {name} takes no graphs; a sweep runs in: {', '.join(get_args(EngineName))}"
        )
    return cast(EngineName, name)


def random_workload(
    shape: str,
    cores: int | None,
    prompt_tokens: int,
    new_tokens: int,
    context: int | None,
    repeats: int,
    seed: int,
    time_limit: float = TIME_LIMIT_S,
) -> Workload:
    """The tokens to time on, of a text drawn at random; `context` None is the usual one. Raises UserError
    for what cannot be timed."""
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or more")
    decoder = decoder_of(shape_config(shape))
    usual = usual_context(prompt_tokens, new_tokens, decoder.max_positions)
    positions = usual if context is None else context
    check_lengths(prompt_tokens, new_tokens, repeats, positions, decoder.max_positions)
    check_time_limit(time_limit)
    length, after = text_lengths(prompt_tokens, new_tokens, positions)
    ids = np.random.default_rng(seed).integers(0, decoder.vocabulary, length + after)
    return Workload(
        cores=choose_cores(cores),
        ids=ids[:length],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        context=positions,
        repeats=repeats,
        following=ids[length:],
        time_limit_s=time_limit,
    )
