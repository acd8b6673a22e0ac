"""Hidden states of all calibration windows, in a file: between two blocks they need no memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .storage import naming_full_disk

TOKENS_AT_ONCE = 2048


class HiddenStates:
    """A float32 array [windows, length, hidden] in a file.

    A few windows are mapped at a time, for as long as they are copied: the pages of a lasting map
    would count as memory of the process.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        """Open `path`, reserving room on disk for the whole array first. Raises UserError when it is full."""
        self.path = path
        self.shape = shape
        size = 4 * shape[0] * shape[1] * shape[2]
        with naming_full_disk(path), path.open("ab") as stream:
            if os.fstat(stream.fileno()).st_size != size:
                os.posix_fallocate(stream.fileno(), 0, size)

    def read(self, windows: slice) -> torch.Tensor:
        """A copy of some windows."""
        return torch.from_numpy(self._map(windows, "r").copy())

    def write(self, windows: slice, states: torch.Tensor) -> None:
        self._map(windows, "r+")[:] = states.cpu().numpy()

    def sync(self) -> None:
        """Return when all that was written survives a power cut."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def batches(self) -> Iterator[slice]:
        """Slices of a few windows each; always the same ones, as sums depend on them."""
        return window_batches(self.shape[0], self.shape[1])

    def _map(self, windows: slice, mode: str) -> NDArray[np.float32]:
        _, length, hidden = self.shape
        offset = 4 * windows.start * length * hidden
        shape = (windows.stop - windows.start, length, hidden)
        return np.memmap(self.path, np.float32, mode, offset, shape)  # type: ignore[call-overload]


def window_batches(windows: int, length: int) -> Iterator[slice]:
    """Slices of 0..windows that hold about TOKENS_AT_ONCE tokens each."""
    step = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, windows, step):
        yield slice(start, min(start + step, windows))
