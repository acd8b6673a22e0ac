"""Weight quantization that keeps zeros exactly zero. Pure functions on arrays.

Every scheme here is symmetric (zero point 0), so a pruned weight is the integer 0 and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from .grid import Grid

# Rounding waits for memory unless its steps stay in the caches; more at once are shared out better.
WEIGHTS_AT_ONCE = 1 << 20


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
    levels, scale = zip(*(_rounded(rows, grid) for rows in _few_rows(weight)), strict=True)
    return Quantized(torch.cat(levels).numpy(), torch.cat(scale).numpy(), grid)


def grid_scale(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Float32 [out, groups]; the step of `grid` that holds every weight of a group, 1 where all are zero.

    A scale per channel is max|w| / highest. One per block is signed, as in GGML's Q4_0: the entry that
    is largest in magnitude maps to the lowest level, which uses the whole range of the grid.
    """
    return torch.cat([_steps(_in_groups(rows, grid), grid) for rows in _few_rows(weight)]).numpy()


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


def _few_rows(weight: np.ndarray) -> Iterator[torch.Tensor]:
    """The rows of [out, in], some at a time: what is made of them on the way stays in the caches."""
    yield from torch.from_numpy(weight).split(max(1, WEIGHTS_AT_ONCE // weight.shape[1]))


def _rounded(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    groups = _in_groups(weight, grid)
    scale = _steps(groups, grid)
    levels = (groups / scale[..., None]).round_().clamp_(grid.lowest, grid.highest).to(torch.int8)
    return levels.flatten(1)[:, : weight.shape[1]], scale


def _in_groups(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights [out, groups, in / groups], of which each group has one scale; padded with zeros."""
    out, columns = weight.shape
    width = grid.block or columns
    return F.pad(weight, (0, -columns % width)).reshape(out, -1, width)


def _steps(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What `grid_scale` says of weights [out, groups, in / groups]."""
    high, low = groups.amax(2), groups.amin(2)
    signed = torch.where(high >= -low, high, low)
    peak, end = (signed.abs(), grid.highest) if grid.block is None else (signed, grid.lowest)
    return torch.where(peak != 0, peak / end, 1.0)
