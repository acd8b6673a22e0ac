"""What a fine-tuning was asked for, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..bench.machine import describe_machine
from ..errors import UserError
from .loss import Distillation

FULL_LEARNING_RATE = 3e-4
LORA_LEARNING_RATE = 2e-3
# These change how a run goes on, not what it is.
NOT_OF_THE_RESULT = ("max_minutes", "save_minutes", "device")


@dataclass(frozen=True)
class Options:
    """The arguments of `finetune` but those that say where to write. See there."""

    model: str
    data: str
    eval_data: str | None
    nsamples: int | None
    seqlen: int
    eval_windows: int
    lora_rank: int | None
    teacher: str | None
    temperature: float
    distill_weight: float
    learning_rate: float | None
    batch_size: int
    accumulate: int
    epochs: float | None
    max_minutes: float | None
    dtype: str
    gradient_checkpointing: bool
    masks: str | None
    save_minutes: float
    seed: int
    device: str

    def check(self) -> None:
        """Raise UserError naming the first option that cannot be."""
        for name in ("nsamples", "eval_windows", "lora_rank", "batch_size", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{_flag(name)} {value} is impossible; give at least 1")
        for name in ("temperature", "learning_rate", "epochs", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"--{_flag(name)} {value} is impossible; give a number above 0")
        if not 0 <= self.distill_weight <= 1:
            raise UserError(f"--distill-weight {self.distill_weight} is impossible; give a share in [0, 1]")
        if not self.save_minutes >= 0:
            raise UserError(f"--save-minutes {self.save_minutes} is impossible; give 0 or more")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype} is unknown; give auto, float32 or bfloat16")

    def settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_OF_THE_RESULT}

    @property
    def rate(self) -> float:
        """The learning rate: as given, or what suits the kind of training."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_LEARNING_RATE if self.lora_rank is None else LORA_LEARNING_RATE

    @property
    def distillation(self) -> Distillation | None:
        if self.teacher is None:
            return None
        return Distillation(self.distill_weight, self.temperature)

    @property
    def seconds(self) -> float | None:
        return None if self.max_minutes is None else 60 * self.max_minutes

    def steps(self, windows: int) -> int:
        """Steps of the optimizer; practically endless for a run that only time limits."""
        if self.epochs is None and self.max_minutes is not None:
            return 10**8
        return max(1, math.ceil((self.epochs or 1) * windows / (self.batch_size * self.accumulate)))


def arithmetic(dtype: str, device: str) -> Literal["float32", "bfloat16"]:
    """The dtype of the arithmetic. auto is bfloat16 where there are instructions for it."""
    if dtype != "auto":
        return "float32" if dtype == "float32" else "bfloat16"
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(describe_machine().isa) else "float32"


def _flag(name: str) -> str:
    return name.replace("_", "-")
