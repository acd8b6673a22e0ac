"""The command line of finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    model: Annotated[str, typer.Argument(help="Artifact folder, or a pruned checkpoint.")],
    data: Annotated[
        str, typer.Option(help="Text to learn from: c4, wikitext2, ptb, builtin (offline), or a file.")
    ] = "c4",
    eval_data: Annotated[
        str | None,
        typer.Option(help="Text to be judged by. Default: the part of --data that is not learned from."),
    ] = None,
    nsamples: Annotated[
        int | None, typer.Option(help="Windows to learn from. Default: all of the text; 4096 of c4.")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows, before and after.")] = 16,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank under the mask, not the weights.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help='Distill from this model; "dense" is the one that the artifact was pruned from.'),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Softmax temperature of the distillation.")] = 1.0,
    distill_weight: Annotated[float, typer.Option(help="Share of the loss that is distillation.")] = 0.5,
    learning_rate: Annotated[
        float | None, typer.Option(help="Highest learning rate. Default: 3e-4, or 2e-3 for adapters.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per step of the optimizer.")] = 1,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the text. Default: 1, or until --max-minutes.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="Be done in this time, evaluations included; the learning rate falls to fit."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic: float32, bfloat16, or auto (bfloat16 where it is fast).")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = False,
    masks: Annotated[
        Path | None, typer.Option(help="Mask file. Default: the artifact's; a checkpoint's zeros.")
    ] = None,
    save_minutes: Annotated[float, typer.Option(help="Save the state for --resume this often.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed for the order of windows and the adapters.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Where to write. Default: <artifact>-tuned.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run from its last saved state.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
) -> None:
    """Train the weights that pruning kept, with the pruned ones held at zero, into a new artifact.

    [bold]dlp-deploy finetune artifacts/llama2-7b-dlp-s70-int8 --data c4 --lora-rank 8 --teacher dense[/bold]

    Full, or with adapters that are merged under the mask. Then export as usual. The loss on held-out
    text before and after, and the curve in between, are kept with the artifact.
    """
    options = locals().copy()
    from . import finetune

    print(finetune(**options))
