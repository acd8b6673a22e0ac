"""dlp-deploy finetune: from a pruned model to a tuned one with the same mask, durably."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from ..artifact import (
    CHECKPOINT,
    MANIFEST,
    MASKS,
    Finetuning,
    HeldOutLoss,
)
from ..calibration import TokenWindows
from ..errors import UserError
from ..evaluation import torch_nll
from ..journal import EVALUATED, TRAINED, Journal
from ..models import ModelFiles, load_tokenizer, resolve_model
from ..progress import progress, say
from ..pruning import ARTIFACTS, calibration_record, chosen_device
from ..storage import named, refuse_existing, sha256_file
from ..unfinished import JOURNAL, unfinished_run, work_folder
from .clock import Clock
from .curve import LoggedStep, draw, logged_steps, write_log
from .holding import HoldMasks, attach_masks, mask_gradients, train_blocks
from .model import load_model, load_teacher
from .options import Options, arithmetic
from .pruned import PrunedModel, is_artifact, open_pruned
from .results import write_tuned_checkpoint, write_tuned_manifest
from .text import TrainingText, keep_text, kept_text, training_text
from .trainer import JournalSteps, MaskedTrainer, ShowProgress, TimeLimit, saved_step

SUFFIX = "-tuned"
LOSS_LOG, LOSS_CURVE = "finetuning.json", "finetuning.png"
# What is held back of a time limit, relative to the time before training: the end repeats the beginning
# (checking the masks, evaluating) and writes the model besides.
RESERVE = 1.25


def run(options: Options, output: Path | None, resume: bool, force: bool) -> Path:
    """Fine-tune as `options` say, into `output` (default: beside the artifact, NAME-tuned)."""
    options.check()
    final = output or _default_output(options.model)
    refuse_existing(final, force)
    device = chosen_device(options.device)
    with _quiet(), unfinished_run(final, options.settings(), resume, force) as folder:
        if not (folder / MANIFEST).is_file():
            _Run(options, folder, device).execute()
    return final


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from saying what is no news here: tied embeddings, how old states are told apart."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mtime may not be reliable")
        try:
            yield
        finally:
            transformers_logging.set_verbosity(before)


def _default_output(model: str) -> Path:
    if is_artifact(model):
        folder = named(Path(model))
        return folder.with_name(folder.name + SUFFIX)
    return ARTIFACTS / (resolve_model(model).name + SUFFIX)


@dataclass(frozen=True)
class _Trained:
    """The tuned tensors by name, the steps that led there, and how many numbers were trained."""

    tensors: dict[str, torch.Tensor]
    steps: Sequence[LoggedStep]
    parameters: int


class _Run:
    """One run in the folder of the growing artifact."""

    def __init__(self, options: Options, folder: Path, device: str) -> None:
        self.options = options
        self.folder = folder
        self.device = device
        self.dtype = arithmetic(options.dtype, device)
        self.work = work_folder(folder)
        self.journal = Journal(self.work / JOURNAL)
        spent = [entry["seconds"] for entry in self.journal.steps(TRAINED)]
        self.clock = Clock(options.seconds, before=spent[-1] if spent else 0.0)

    def execute(self) -> None:
        options = self.options
        dense = self._dense()
        pruned = open_pruned(
            options.model, None if options.masks is None else Path(options.masks), dense, self.work
        )
        if options.seqlen > pruned.decoder.max_positions:
            raise UserError(
                f"--seqlen {options.seqlen} is longer than the {pruned.decoder.max_positions} positions "
                f"of {options.model}"
            )
        tokenizer = load_tokenizer(pruned.files)
        text = self._text(tokenizer)
        before = self._loss_before(pruned.files, text.held_out)
        teacher = self._teacher(pruned, dense, tokenizer)
        trained = self._train(pruned, text.training.ids, teacher)
        del teacher
        write_tuned_checkpoint(self.folder, pruned, trained.tensors)
        tuned = ModelFiles(self.folder.name, str(self.folder), self.folder / CHECKPOINT)
        after = _loss(tuned, text.held_out)
        say(f"Held-out loss {before:.4f} -> {after:.4f} nats per token; masks unchanged")
        write_log(self.folder / LOSS_LOG, trained.steps, (before, after))
        draw(self.folder / LOSS_CURVE, trained.steps, (before, after), options.teacher is not None)
        write_tuned_manifest(self.folder, pruned, self._record(text, trained, before, after))

    def _dense(self) -> ModelFiles | None:
        """The model before pruning, if --teacher names it."""
        teacher = self.options.teacher
        return None if teacher in (None, "dense") else resolve_model(str(teacher))

    def _teacher(self, pruned: PrunedModel, dense: ModelFiles | None, tokenizer: Any) -> Any | None:
        if self.options.teacher is None:
            return None
        if dense is None:
            if not is_artifact(self.options.model):
                raise UserError("a bare checkpoint names no dense model; give --teacher MODEL")
            dense = resolve_model(pruned.source.location)
        return load_teacher(dense, tokenizer, getattr(torch, self.dtype))

    def _text(self, tokenizer: Any) -> TrainingText:
        options = self.options
        kept = kept_text(self.work, options.data, options.eval_data, options.seed)
        if kept is not None:
            return kept
        text = training_text(
            options.data,
            options.eval_data,
            tokenizer,
            options.nsamples,
            options.seqlen,
            options.eval_windows,
            options.seed,
        )
        keep_text(self.work, text)
        return text

    def _loss_before(self, files: ModelFiles, windows: TokenWindows) -> float:
        """The loss before training, measured once; the clock learns what to hold back for the end."""
        done = self.journal.steps(EVALUATED)
        if not done:
            loss = _loss(files, windows)
            self.journal.append(EVALUATED, loss=loss, seconds=self.clock.spent())
            done = self.journal.steps(EVALUATED)
        self.clock.reserve = RESERVE * done[0]["seconds"]
        return done[0]["loss"]

    def _train(self, pruned: PrunedModel, ids: torch.Tensor, teacher: Any | None) -> _Trained:
        set_seed(self.options.seed)
        model, parameters = self._model(pruned)
        say(
            f"Training {parameters:,} parameters on {len(ids):,} windows of {ids.shape[1]} tokens "
            f"in {self.dtype} on {self.device}"
        )
        with progress("Fine-tuning", 1000) as advance:
            trainer = MaskedTrainer(
                model,
                self._arguments(len(ids)),
                ids,
                self.clock,
                teacher,
                self.options.distillation,
                [
                    HoldMasks(),
                    TimeLimit(self.clock, 60 * self.options.save_minutes),
                    JournalSteps(self.journal, self.clock),
                    ShowProgress(advance, self.clock),
                ],
            )
            state = self._run_trainer(trainer)
        if self.options.lora_rank is not None:
            from .lora import merged

            model = merged(model)
        return _Trained(dict(model.state_dict()), logged_steps(state.log_history), parameters)

    def _model(self, pruned: PrunedModel) -> tuple[Any, int]:
        """The model, ready to be trained under its masks, and how many of its parameters are."""
        rank = self.options.lora_rank
        model = load_model(pruned.files, torch.float32 if rank is None else None)
        attach_masks(model, pruned.masks)
        if rank is None:
            train_blocks(model, pruned.decoder.family)
            mask_gradients(model)
        else:
            from .lora import with_adapters

            model = with_adapters(model, pruned.decoder.family, rank, self.work)
        return model, sum(p.numel() for p in model.parameters() if p.requires_grad)

    def _arguments(self, windows: int) -> TrainingArguments:
        options = self.options
        return TrainingArguments(
            output_dir=str(self.work),
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate,
            max_steps=options.steps(windows),
            learning_rate=options.rate,
            bf16=self.dtype == "bfloat16",
            use_cpu=self.device == "cpu",
            gradient_checkpointing=options.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            weight_decay=0.0,
            adam_beta2=0.95,
            save_strategy="no",  # TimeLimit says when
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,
            seed=options.seed,
            data_seed=options.seed,
            remove_unused_columns=False,
            label_names=[],
            dataloader_pin_memory=self.device != "cpu",
            disable_tqdm=True,
            report_to=[],
        )

    def _run_trainer(self, trainer: MaskedTrainer) -> TrainerState:
        saved = self.journal.steps(TRAINED)
        if not saved:
            trainer.train()
            return trainer.state
        folder = saved_step(self.work, saved[-1]["at"])
        if not saved[-1]["finished"]:
            trainer.train(resume_from_checkpoint=str(folder))
            return trainer.state
        trainer.restore(folder)
        return TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _record(self, text: TrainingText, trained: _Trained, before: float, after: float) -> Finetuning:
        options = self.options
        distillation = options.distillation
        return Finetuning(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            text=calibration_record(text.training),
            held_out=_held_out(text.held_out, before, after),
            lora_rank=options.lora_rank,
            teacher=options.teacher,
            temperature=None if distillation is None else distillation.temperature,
            distill_weight=None if distillation is None else distillation.weight,
            learning_rate=options.rate,
            windows_per_step=options.batch_size * options.accumulate,
            steps=trained.steps[-1].step,
            trained_parameters=trained.parameters,
            dtype=self.dtype,
            seconds=round(self.clock.spent(), 1),
            masks_sha256=sha256_file(self.folder / MASKS),
        )


def _loss(files: ModelFiles, windows: TokenWindows) -> float:
    """Mean negative log-likelihood in nats per token, of the checkpoint as it is on disk, in float32."""
    return float(torch_nll(files, windows).mean(dtype="float64"))


def _held_out(windows: TokenWindows, before: float, after: float) -> HeldOutLoss:
    count, length = windows.ids.shape
    return HeldOutLoss(
        source=windows.source,
        windows=count,
        tokens_per_window=length,
        sha256=windows.sha256,
        before=before,
        after=after,
    )
