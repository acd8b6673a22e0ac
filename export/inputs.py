"""How an engine rounds what enters its linear layers to int8, written in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

# The least peak of a token or layer: one of zeros (padding) must not divide by zero.
TINY = 1e-9


@dataclass(frozen=True)
class Int8Inputs:
    """Dynamic: the scale of each token is max|x| / 127. With `scales`, by layer, static: it is fixed."""

    scales: Mapping[str, float] | None = None

    def rounded(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., channels] on the int8 grid that it has as input of `layer`."""
        if self.scales is None:
            scale = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / 127
            return torch.round(x / scale) * scale
        fixed = self.scales[layer]
        return torch.round(x / fixed).clamp_(-128, 127) * fixed


@contextmanager
def rounded_inputs(linears: Mapping[str, torch.nn.Linear], inputs: Int8Inputs | None) -> Iterator[None]:
    """Let each of the layers see its input as the engine rounds it; layers that share one still do."""
    if inputs is None:
        yield
        return
    seen: list[torch.Tensor] = []

    def round_input(layer: str, module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> torch.Tensor:
        if not seen or seen[0] is not arguments[0]:
            seen[:] = arguments[0], inputs.rounded(layer, arguments[0])
        return seen[1]

    handles = [
        linear.register_forward_pre_hook(partial(round_input, layer)) for layer, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
