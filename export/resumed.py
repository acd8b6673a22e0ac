"""What an interrupted export has finished and need not do again: smoothing, and each block that was rounded.

It lies below the artifact until all graphs that were asked for are verified, in folders and files that are
named for what they depend on: the checkpoint, the text and the graph.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..calibration import TokenWindows
from ..checkpoint import Checkpoint
from ..hidden import HiddenStates
from ..storage import PARTIAL_SUFFIX, atomic_path
from .grid import Grid
from .plan import Graph
from .quantize import Quantized
from .smooth import Smoothing

FOLDER = f"quantization{PARTIAL_SUFFIX}"


def inputs_digest(checkpoint: Checkpoint, text: TokenWindows) -> str:
    """What is measured depends on: this release, the tokens, and the files of `checkpoint`, by name, size and
    time of their last change."""
    files = {checkpoint.file(name) for name in checkpoint.names()}
    stats = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _digest([version("dlp-deploy"), text.sha256, stats])


def graph_digest(graph: Graph, kept: Sequence[str], inputs: str) -> str:
    """What the rounded weights of a graph depend on, of which `inputs` is the `inputs_digest`."""
    return _digest([asdict(graph), list(kept), inputs])


def drop_rounded(folder: Path) -> None:
    """Remove the rounded blocks of all graphs from `folder`, but not the smoothing that others may need."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def smoothing_below(
    folder: Path, inputs: str, migration: float | None, measure: Callable[[], Smoothing]
) -> Smoothing:
    """The smoothing that was stored in `folder`; where there is none, it is measured, and stored."""
    path = folder / f"smoothing-{_digest([migration, inputs])}.safetensors"
    if path.exists():
        return _read_smoothing(path, migration)
    smoothing = measure()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(_arrays_of(smoothing), temporary)
    return smoothing


def _arrays_of(smoothing: Smoothing) -> dict[str, np.ndarray]:
    """Named KIND:MODULE, as the fields of `Smoothing` are."""
    kinds: dict[str, Mapping[str, Any]] = {
        "columns": smoothing.columns,
        "rows": smoothing.rows,
        "norms": smoothing.norms,
        "input_scales": smoothing.input_scales,
    }
    return {
        f"{kind}:{module}": np.atleast_1d(value)
        for kind, values in kinds.items()
        for module, value in values.items()
    }


def _read_smoothing(path: Path, migration: float | None) -> Smoothing:
    smoothing = Smoothing(migration=migration)
    for name, array in load_file(path).items():
        kind, _, module = name.partition(":")
        getattr(smoothing, kind)[module] = array.item() if kind == "input_scales" else array
    return smoothing


class RoundedBlocks:
    """The rounded layers of the first blocks of a model, `finished` in number, in files of `folder`, and the
    hidden states [windows, length, hidden] behind the last of them."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shape = folder, shape
        self.finished = 0
        while self._path(self.finished).exists():
            self.finished += 1

    def states(self, index: int) -> HiddenStates:
        """What block `index` reads. It writes to another file, so this one holds until it is finished."""
        return HiddenStates(self._folder / f"hidden-{index % 2}", self._shape)

    def append(self, layers: Mapping[str, Quantized]) -> None:
        """The next block is finished, and so are the states behind it."""
        self.states(self.finished + 1).sync()
        arrays: dict[str, np.ndarray] = {}
        for layer, quantized in layers.items():
            nonzero = quantized.levels != 0
            arrays |= {
                f"shape:{layer}": np.array(nonzero.shape),
                f"nonzero:{layer}": np.packbits(nonzero),
                f"levels:{layer}": quantized.levels[nonzero],
                f"scale:{layer}": quantized.scale,
            }
        with atomic_path(self._path(self.finished)) as temporary:
            save_file(arrays, temporary)
        self.finished += 1

    def read(self, index: int, grid: Grid) -> dict[str, Quantized]:
        """The layers of a finished block, which were rounded to `grid`."""
        arrays = load_file(self._path(index))
        layers = [name.removeprefix("shape:") for name in arrays if name.startswith("shape:")]

        def quantized(layer: str) -> Quantized:
            levels = np.zeros(arrays[f"shape:{layer}"], np.int8)
            nonzero = np.unpackbits(arrays[f"nonzero:{layer}"], count=levels.size).view(bool)
            levels[nonzero.reshape(levels.shape)] = arrays[f"levels:{layer}"]
            return Quantized(levels, arrays[f"scale:{layer}"], grid)

        return {layer: quantized(layer) for layer in layers}

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:05}.safetensors"
