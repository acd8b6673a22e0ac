"""Weight quantization that keeps zeros exactly zero. Pure functions on arrays.

Every scheme here is symmetric (zero point 0), so a pruned weight is the integer 0 and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChannelQuantized:
    """`values` int8 [out, in] and `scale` float32 [out]: weight ~ values * scale[:, None]."""

    values: np.ndarray
    scale: np.ndarray

    def dequantize(self) -> np.ndarray:
        return self.values.astype(np.float32) * self.scale[:, None]


def quantize_per_channel(weight: np.ndarray, bits: int = 8) -> ChannelQuantized:
    """Round float32 [out, in] to the nearest of 2^bits - 1 levels, one scale per output channel.

    The scale is max|w| / (2^(bits-1) - 1); a channel of zeros has scale 1. The values lie in an
    int8 container whatever `bits` is.
    """
    top = 2 ** (bits - 1) - 1
    peak = np.abs(weight).max(axis=1)
    scale = np.where(peak > 0, peak / top, 1.0).astype(np.float32)
    values = np.rint(weight / scale[:, None])
    return ChannelQuantized(np.clip(values, -top, top).astype(np.int8), scale)


@dataclass(frozen=True)
class BlockQuantized:
    """Weights as MatMulNBits stores them.

    `packed` uint8 [out, in / block, block * bits / 8] holds value + 2^(bits-1), low nibble first;
    `scale` float32 [out, in / block]. The in dimension is padded with zeros to a whole block.
    """

    packed: np.ndarray
    scale: np.ndarray
    bits: int
    block: int


def quantize_per_block(weight: np.ndarray, bits: int, block: int) -> BlockQuantized:
    """Round float32 [out, in] to `bits` (4 or 8) with one scale per `block` inputs of a channel.

    The scale is signed, as in GGML's Q4_0: the entry largest in magnitude maps to -2^(bits-1), which
    uses the whole range of the two's complement grid while zero stays exactly zero.
    """
    out, inputs = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -inputs % block))).reshape(out, -1, block)
    half = 2 ** (bits - 1)
    peak = np.take_along_axis(padded, np.abs(padded).argmax(axis=2)[..., None], axis=2)
    scale = np.where(peak != 0, -peak / half, 1.0).astype(np.float32)
    levels = np.clip(np.rint(padded / scale), -half, half - 1).astype(np.int16) + half
    levels = levels.astype(np.uint8)
    packed = levels if bits == 8 else levels[..., 0::2] | (levels[..., 1::2] << 4)
    return BlockQuantized(np.ascontiguousarray(packed), scale[..., 0], bits, block)


def dequantize_per_block(quantized: BlockQuantized, inputs: int) -> np.ndarray:
    """The float32 [out, inputs] matrix that `quantized` stands for."""
    half = 2 ** (quantized.bits - 1)
    packed = quantized.packed
    if quantized.bits == 4:
        packed = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1)
    values = packed.astype(np.float32) - half
    return (values * quantized.scale[..., None]).reshape(packed.shape[0], -1)[:, :inputs]
