"""transformers' Trainer with masks, distillation, and a learning rate that fits a time limit."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..errors import UserError
from ..families import family_of
from ..journal import TRAINED, Journal
from ..progress import Advance
from ..storage import sync_folder
from .clock import Clock
from .loss import Distillation, Head, cross_entropy, distilled

WARM_UP_STEPS = 20
WARM_UP_SHARE = 0.05


class MaskedTrainer(Trainer):
    """Trains a causal language model on batches {"input_ids": int64 [windows, length]}.

    The loss is that of the next token, or with `teacher` a mixture with the divergence from the teacher's
    distribution. The learning rate rises over the first steps and then falls linearly, to zero when all
    steps are done or the clock's time is up, whichever is nearer.
    """

    lr_scheduler: Any

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        windows: torch.Tensor,
        clock: Clock,
        teacher: Any | None = None,
        distillation: Distillation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        dataset: Any = [{"input_ids": window} for window in windows]
        super().__init__(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        # The mean over a batch is returned; the Trainer divides it by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self._clock = clock
        self._teacher = None if teacher is None else teacher.to(args.device).eval()
        self._distillation = distillation

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        targets = ids[:, 1:].reshape(-1)
        device = ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.args.bf16):
            states, head = self._states(model, ids)
            if self._teacher is None:
                return cross_entropy(states, head, targets)
            assert self._distillation is not None
            with torch.no_grad():
                teacher_states, teacher_head = self._states(self._teacher, ids)
            return distilled(states, head, targets, teacher_states, teacher_head, self._distillation)

    def _states(self, model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """What enters the head, [tokens, hidden], for all but the last token of each window, and the head."""
        model = self.accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        base = model.get_submodule(family_of(model.config).blocks.rpartition(".")[0])
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        dtype = torch.bfloat16 if self.args.bf16 else hidden.dtype
        weight = model.get_output_embeddings().weight.to(dtype)
        head = Head(weight, getattr(model.config, "final_logit_softcapping", None))
        return hidden.reshape(-1, hidden.shape[-1]).to(dtype), head

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        if self.lr_scheduler is None:
            warm_up = min(WARM_UP_STEPS, max(1, int(num_training_steps * WARM_UP_SHARE)))

            def factor(step: int) -> float:
                share = self._clock.share()
                done = max(step / num_training_steps, share)
                risen = max((step + 1) / warm_up, share / WARM_UP_SHARE)
                return min(1.0, risen) * max(0.0, 1.0 - done)

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of the run to what is logged. Raises UserError when the loss is not finite."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"the loss is {logs['loss']} at step {self.state.global_step}; give a smaller --learning-rate"
            )
        super().log(logs | {"seconds": round(self._clock.spent(), 3)}, start_time)

    def restore(self, folder: Path) -> None:
        """Take the weights of a saved step, as for going on from there, without training."""
        self._load_from_checkpoint(str(folder))


class TimeLimit(TrainerCallback):
    """Ends training when its time is up, and lets the state be saved then and every few minutes."""

    def __init__(self, clock: Clock, save_seconds: float) -> None:
        self._clock = clock
        self._save_seconds = save_seconds
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._clock.share() >= 1:
            control.should_training_stop = True
        if control.should_training_stop or time.monotonic() - self._saved >= self._save_seconds:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()


class JournalSteps(TrainerCallback):
    """Notes in the journal each step whose state is saved, once it is on disk to stay."""

    def __init__(self, journal: Journal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = saved_step(Path(args.output_dir), state.global_step)
        for path in folder.iterdir():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        sync_folder(folder)
        sync_folder(folder.parent)
        finished = bool(control.should_training_stop)
        self._journal.append(TRAINED, at=state.global_step, seconds=self._clock.spent(), finished=finished)


def saved_step(folder: Path, step: int) -> Path:
    """Where the Trainer saves the state after `step`."""
    return folder / f"checkpoint-{step}"


class ShowProgress(TrainerCallback):
    """Moves a bar of 1000 parts, whichever of steps and time is nearer to its end."""

    def __init__(self, advance: Advance, clock: Clock) -> None:
        self._advance = advance
        self._clock = clock
        self._shown = 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = max(state.global_step / state.max_steps, self._clock.share())
        parts = min(1000, round(1000 * done))
        loss = kwargs["logs"].get("loss")
        self._advance(parts - self._shown, note="" if loss is None else f"loss {loss:.3f}")
        self._shown = parts
