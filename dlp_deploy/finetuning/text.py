"""What a model is fine-tuned on, and the held-out text that says whether it helped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibration import (
    HUB_TEXTS,
    TokenWindows,
    calibration_windows,
    evaluation_windows,
    file_windows,
    stored_windows,
)
from ..checkpoint import write_shard
from ..errors import UserError

C4_WINDOWS = 4096
HELD_OUT_SHARE = 10


@dataclass(frozen=True)
class TrainingText:
    """Token windows int64 [windows, length] to learn from, and others of the same length to be judged by."""

    training: TokenWindows
    held_out: TokenWindows


def training_text(
    data: str,
    eval_data: str | None,
    tokenizer: Any,
    nsamples: int | None,
    seqlen: int,
    held_out: int,
    seed: int,
) -> TrainingText:
    """Windows of the text `data`, in random order and without overlap, and `held_out` windows to judge by.

    The built-in text and those of the hub have a part for each purpose. Of a file, the last windows (at
    most a tenth) are held out, unless `eval_data` names another text. `nsamples` None takes all there
    is, of c4 the first 4096 drawn. Raises UserError as `calibration_windows` does.
    """
    if data not in (*HUB_TEXTS, "builtin") and eval_data in (None, data):
        return _split_file(data, tokenizer, nsamples, seqlen, held_out, seed)
    count = C4_WINDOWS if nsamples is None and data == "c4" else nsamples
    training = calibration_windows(data, tokenizer, count, seqlen, seed)
    return TrainingText(training, evaluation_windows(eval_data or data, tokenizer, held_out, seqlen))


def _split_file(
    data: str, tokenizer: Any, nsamples: int | None, seqlen: int, held_out: int, seed: int
) -> TrainingText:
    windows = file_windows(data, tokenizer, seqlen)
    if len(windows) < 2:
        raise UserError(
            f"text {data} has one window of {seqlen} tokens; give a longer one, a smaller --seqlen, "
            "or another text as --eval-data"
        )
    last = min(held_out, max(1, len(windows) // HELD_OUT_SHARE))
    order = torch.randperm(len(windows) - last, generator=torch.Generator().manual_seed(seed))
    return TrainingText(
        TokenWindows.of(windows[order[:nsamples]], data, seed), TokenWindows.of(windows[-last:], data, seed)
    )


def kept_text(folder: Path, data: str, eval_data: str | None, seed: int) -> TrainingText | None:
    """The text that `keep_text` put into `folder`, or None."""
    path = folder / "windows.safetensors"
    if not path.is_file():
        return None
    return TrainingText(
        stored_windows(path, data, seed), stored_windows(path, eval_data or data, seed, "held_out")
    )


def keep_text(folder: Path, text: TrainingText) -> None:
    """Keep the windows for a resumed run: a data set may be out of reach by then."""
    write_shard(folder / "windows.safetensors", {"ids": text.training.ids, "held_out": text.held_out.ids})
