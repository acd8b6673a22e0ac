"""Weight quantization that keeps zeros exactly zero. Pure functions on arrays.

Every scheme here is symmetric (zero point 0), so a pruned weight is the integer 0 and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, with one scale per output channel, or per `block` inputs of it."""

    bits: int
    block: int | None = None

    @property
    def lowest(self) -> int:
        """A scale per channel uses -127..127, as int8 kernels want it; one per block the whole range."""
        return -(2 ** (self.bits - 1)) + (self.block is None)

    @property
    def stored_bytes(self) -> float:
        """Bytes of a weight in the graph, with its part of the scale. Per channel the container is int8."""
        return 1.0 if self.block is None else self.bits / 8 + 4 / self.block

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Quantized:
    """`levels` int8 [out, in] on `grid`, and `scale` float32 [out, groups]; the value is their product."""

    levels: np.ndarray
    scale: np.ndarray
    grid: Grid

    def dequantize(self) -> np.ndarray:
        """The float32 [out, in] matrix that this stands for."""
        return self.levels.astype(np.float32) * scale_of_columns(self.scale, self.grid, self.levels.shape[1])


def quantize(weight: np.ndarray, grid: Grid) -> Quantized:
    """Round float32 [out, in] to the nearest level of `grid`."""
    scale = grid_scale(weight, grid)
    levels = np.rint(weight / scale_of_columns(scale, grid, weight.shape[1]))
    return Quantized(np.clip(levels, grid.lowest, grid.highest).astype(np.int8), scale, grid)


def grid_scale(weight: np.ndarray, grid: Grid) -> np.ndarray:
    """Float32 [out, groups]; the step of `grid` that holds every weight of a group, 1 where all are zero.

    A scale per channel is max|w| / highest. One per block is signed, as in GGML's Q4_0: the entry that
    is largest in magnitude maps to the lowest level, which uses the whole range of the grid.
    """
    if grid.block is None:
        peak = np.abs(weight).max(axis=1, keepdims=True)
        return np.where(peak > 0, peak / grid.highest, 1.0).astype(np.float32)
    blocks = _in_blocks(weight, grid.block)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    return np.where(peak != 0, peak / grid.lowest, 1.0).astype(np.float32)


def scale_of_columns(scale: np.ndarray, grid: Grid, columns: int) -> np.ndarray:
    """The scale of each weight, [out, columns], or [out, 1] where a channel has only one."""
    return scale if grid.block is None else scale.repeat(grid.block, axis=1)[:, :columns]


def pack_blocks(quantized: Quantized) -> np.ndarray:
    """Levels as MatMulNBits stores them: uint8 [out, in / block, block * bits / 8].

    They hold level + 2^(bits-1), low nibble first; the in dimension is padded with zeros to a block.
    """
    grid = quantized.grid
    assert grid.block is not None
    levels = (_in_blocks(quantized.levels.astype(np.int16), grid.block) - grid.lowest).astype(np.uint8)
    return np.ascontiguousarray(levels if grid.bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4))


def unpack_blocks(packed: np.ndarray, grid: Grid, columns: int) -> np.ndarray:
    """Levels int8 [out, columns] from what `pack_blocks` returned."""
    if grid.bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1)
    return (packed.reshape(len(packed), -1)[:, :columns].astype(np.int16) + grid.lowest).astype(np.int8)


def _in_blocks(matrix: np.ndarray, block: int) -> np.ndarray:
    out, columns = matrix.shape
    return np.pad(matrix, ((0, 0), (0, -columns % block))).reshape(out, -1, block)
