"""Weight quantization that keeps zeros exactly zero. Pure functions on arrays.

Every scheme here is symmetric (zero point 0), so a pruned weight is the integer 0 and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..threads import map_in_threads
from .grid import Grid

# Rounding waits for memory unless its steps stay in the caches.
WEIGHTS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Quantized:
    """`levels` int8 [out, in] on `grid`, and `scale` float32 [out, groups]; the value is their product."""

    levels: np.ndarray
    scale: np.ndarray
    grid: Grid

    def dequantize(self) -> np.ndarray:
        """The float32 [out, in] matrix that this stands for."""
        values = self.levels.astype(np.float32)
        values *= scale_of_columns(self.scale, self.grid, self.levels.shape[1])
        return values


def quantize(weight: np.ndarray, grid: Grid) -> Quantized:
    """Round float32 [out, in] to the nearest level of `grid`."""
    levels, scale = np.empty(weight.shape, np.int8), _empty_scale(weight, grid)

    def round_rows(rows: slice) -> None:
        groups = _in_groups(weight[rows], grid)
        scale[rows] = _steps(groups, grid)
        nearest = groups / scale[rows, :, None]
        np.rint(nearest, out=nearest)
        np.clip(nearest, grid.lowest, grid.highest, out=nearest)
        levels[rows] = nearest.reshape(len(groups), -1)[:, : weight.shape[1]]

    map_in_threads(round_rows, _few_rows(weight))
    return Quantized(levels, scale, grid)


def grid_scale(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Float32 [out, groups]; the step of `grid` that holds every weight of a group, 1 where all are zero, or
    too small for a step.

    A scale per channel is max|w| / highest. One per block is signed, as in GGML's Q4_0: the entry that
    is largest in magnitude maps to the lowest level, which uses the whole range of the grid.
    """
    scale = _empty_scale(weight, grid)

    def scale_rows(rows: slice) -> None:
        scale[rows] = _steps(_in_groups(weight[rows], grid), grid)

    map_in_threads(scale_rows, _few_rows(weight))
    return scale


def scale_of_columns(scale: np.ndarray, grid: Grid, columns: int) -> np.ndarray:
    """The scale of each weight, [out, columns], or [out, 1] where a channel has only one."""
    return scale if grid.block is None else scale.repeat(grid.block, axis=1)[:, :columns]


def pack_blocks(quantized: Quantized) -> np.ndarray:
    """Levels as MatMulNBits stores them: uint8 [out, in / block, block * bits / 8].

    They hold level + 2^(bits-1), low nibble first; the in dimension is padded with zeros to a block.
    """
    grid, (out, columns) = quantized.grid, quantized.levels.shape
    assert grid.block is not None
    padded = np.pad(quantized.levels, ((0, 0), (0, -columns % grid.block)))
    levels = (padded.view(np.uint8) + np.uint8(-grid.lowest)).reshape(out, -1, grid.block)
    return levels if grid.bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)


def unpack_blocks(packed: np.ndarray, grid: Grid, columns: int) -> np.ndarray:
    """Levels int8 [out, columns] from what `pack_blocks` returned."""
    if grid.bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    return (packed.reshape(len(packed), -1)[:, :columns] - np.uint8(-grid.lowest)).view(np.int8)


def _few_rows(weight: np.ndarray) -> Iterator[slice]:
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def _empty_scale(weight: np.ndarray, grid: Grid) -> np.ndarray:
    out, columns = weight.shape
    return np.empty((out, -(-columns // (grid.block or columns))), np.float32)


def _in_groups(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Weights [out, groups, in / groups], of which each group has one scale; padded with zeros."""
    out, columns = weight.shape
    width = grid.block or columns
    missing = -columns % width
    return (np.pad(weight, ((0, 0), (0, missing))) if missing else weight).reshape(out, -1, width)


def _steps(groups: np.ndarray, grid: Grid) -> np.ndarray:
    """What `grid_scale` says of weights [out, groups, in / groups]."""
    high, low = groups.max(axis=2), groups.min(axis=2)
    signed = np.where(high >= -low, high, low)
    peak, end = (np.abs(signed), grid.highest) if grid.block is None else (signed, grid.lowest)
    step = peak / np.float32(end)
    # Where the weights are so small that a step of them is 0, they are as good as zeros.
    return np.where(step != 0, step, np.float32(1))
