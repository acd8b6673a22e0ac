"""The grids that weights are rounded to, apart from the rounding: what is planned must not load torch."""

from __future__ import annotations

from dataclasses import dataclass


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
