"""Recipes run by their tools, SparseML and llm-compressor, in environments of their own."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..bench.engines import engine_named
from ..bench.environments import clean_environment, interpreter

Tool = Literal["sparseml", "llmcompressor"]
TOOLS: tuple[Tool, ...] = ("sparseml", "llmcompressor")

WORKER = Path(__file__).with_name("oneshot_worker.py")


@dataclass(frozen=True)
class Outcome:
    """What a tool made of a recipe: the kinds of modifiers that it read, and weights or an error.

    `weights` is a safetensors file with the linear layers' weights after the recipe, float32.
    """

    kinds: tuple[str, ...]
    weights: Path | None
    error: str


def oneshot(
    tool: Tool,
    checkpoint: Path,
    recipes: Sequence[Path],
    windows: torch.Tensor,
    folder: Path,
    threads: int = 1,
) -> list[Outcome]:
    """Let `tool` apply each recipe to a Hugging Face checkpoint, calibrating on `windows` int64 [n, length].

    Files named after the recipes are written to `folder`. Raises UserError when the tool is not
    installed, RuntimeError with the last line of its log when it does not start or dies.
    """
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "windows.npy"
        np.save(tokens, windows.numpy())
        paths = [checkpoint.resolve(), tokens, folder.resolve(), *(recipe.resolve() for recipe in recipes)]
        # In a folder of its own, as the tools leave their logs in the current one.
        _run(tool, [str(path) for path in paths], Path(temporary), threads)
    return [_outcome(folder / recipe.stem) for recipe in recipes]


def _run(tool: Tool, arguments: list[str], folder: Path, threads: int) -> None:
    done = subprocess.run(
        [str(interpreter(engine_named(tool))), str(WORKER), tool, *arguments],
        cwd=folder,
        env={**clean_environment(), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{tool} ended with status {done.returncode}: {last}")


def _outcome(stem: Path) -> Outcome:
    written = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
    weights = None if written["error"] else stem.with_name(stem.name + ".safetensors")
    return Outcome(tuple(written["kinds"]), weights, written["error"])
