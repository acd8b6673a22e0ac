"""Fine-tuning of what a pruning kept, with the pruned weights held at zero."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def finetune(
    model: str | Path,
    data: str = "c4",
    eval_data: str | None = None,
    nsamples: int | None = None,
    seqlen: int = 512,
    eval_windows: int = 16,
    lora_rank: int | None = None,
    teacher: str | None = None,
    temperature: float = 1.0,
    distill_weight: float = 0.5,
    learning_rate: float | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    epochs: float | None = None,
    max_minutes: float | None = None,
    dtype: str = "auto",
    gradient_checkpointing: bool = False,
    masks: Path | None = None,
    save_minutes: float = 10.0,
    seed: int = 0,
    device: str = "auto",
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Train the weights that the masks of `model` keep, and return the folder of the new artifact.

    `model` is an artifact, or a pruned checkpoint whose masks are in the file `masks` or, without one,
    its zeros. Linear layers, biases and norms of the blocks are trained in float32, or with `lora_rank`
    adapters under the mask, which are merged at the end; embedding and head stay as they are. With
    `teacher` (a model, or "dense" for the one that the artifact was pruned from), `distill_weight` of
    the loss is the divergence from its distribution at `temperature`.

    `data` and `eval_data` are named as for calibration; the windows that the loss is held out on are
    never trained on. `epochs` defaults to 1, or to as many as fit in `max_minutes`, which is the wall
    time of the whole run, evaluations included: the learning rate falls to zero by then. `dtype` is that
    of the arithmetic: float32, bfloat16 (autocast), or auto, which is bfloat16 where the processor has
    instructions for it. A run that was stopped goes on with `resume` from the last state saved, every
    `save_minutes`; without a time limit its result is the same as that of a run that was not.

    The result is an artifact as prune writes it: export, eval and finetune take it. Raises UserError
    for what the user can mend, and RuntimeError rather than write a model whose mask has changed.
    """
    _require_libraries(lora_rank is not None)
    # Imported here: the libraries of fine-tuning are an extra, and take seconds.
    from .options import Options
    from .run import run

    options = Options(
        model=str(model),
        data=data,
        eval_data=eval_data,
        nsamples=nsamples,
        seqlen=seqlen,
        eval_windows=eval_windows,
        lora_rank=lora_rank,
        teacher=teacher,
        temperature=temperature,
        distill_weight=distill_weight,
        learning_rate=learning_rate,
        batch_size=batch_size,
        accumulate=accumulate,
        epochs=epochs,
        max_minutes=max_minutes,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        masks=None if masks is None else str(masks),
        save_minutes=save_minutes,
        seed=seed,
        device=device,
    )
    return run(options, None if output is None else Path(output), resume, force)


def _require_libraries(lora: bool) -> None:
    try:
        import accelerate  # noqa: F401

        if lora:
            import peft  # noqa: F401
    except ImportError as error:
        name = (error.name or "a library").partition(".")[0]
        raise UserError(f"fine-tuning needs {name}; run: pip install 'dlp-deploy[finetune]'") from None
