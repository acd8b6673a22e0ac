"""What the pruning methods must know of the inputs of each linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .blocks import Block
from .gram import add_products, mirror
from .hidden import HiddenStates

Kind = Literal["norms", "gram"]


@dataclass(frozen=True)
class Inputs:
    """Input norms ||X_j||_2, float32 [in], or Gram matrices X^T X, float32 [in, in], over all tokens.

    Layers that share their input share the entry of the first of them, their leader.
    """

    kind: Kind
    values: dict[str, torch.Tensor]
    leaders: dict[str, str]

    def of(self, linear: str) -> torch.Tensor:
        return self.values[self.leaders[linear]]

    def sharing(self, leader: str) -> list[str]:
        """The layers whose input is that of `leader`, itself first."""
        return [linear for linear, its_leader in self.leaders.items() if its_leader == leader]

    def norms(self) -> dict[str, torch.Tensor]:
        """The input norms of every linear layer."""
        by_leader = {
            leader: value.diagonal().sqrt() if self.kind == "gram" else value
            for leader, value in self.values.items()
        }
        return {linear: by_leader[leader] for linear, leader in self.leaders.items()}


class _Seen(Exception):
    """Leaves a block's forward pass when the inputs of all linear layers were seen."""


def measure_inputs(
    block: Block,
    source: HiddenStates,
    kind: Kind,
    device: torch.device,
    target: HiddenStates | None = None,
) -> Inputs:
    """Run a block over all windows of `source` and measure the inputs of its linear layers.

    The block's output goes into `target`; without one, what follows the last linear layer's input is
    not computed.
    """
    collector = _Collector(kind)
    with _hooked(block.linears, collector, whole=target is not None):
        for windows in source.batches():
            hidden = source.read(windows).to(device)
            with suppress(_Seen):
                output = block.run(hidden)
                if target is not None:
                    target.write(windows, output)
    return collector.result()


def measure_rows(rows: Iterable[torch.Tensor], kind: Kind) -> torch.Tensor:
    """The same of one layer whose inputs are all `rows`, float32 [some tokens, in] each: norms or X^T X."""
    collector = _Collector(kind)
    for some in rows:
        collector.see("", some)
    return collector.result().of("")


class _Collector:
    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.sums: dict[str, torch.Tensor] = {}
        self.leaders: dict[str, str] = {}
        self._latest: tuple[str, torch.Tensor] | None = None

    def see(self, linear: str, inputs: torch.Tensor) -> None:
        if self._latest is not None and self._latest[1] is inputs:
            self.leaders[linear] = self._latest[0]
            return
        self._latest = (linear, inputs)
        self.leaders[linear] = linear
        self._add(linear, inputs.reshape(-1, inputs.shape[-1]).float())

    def _add(self, linear: str, rows: torch.Tensor) -> None:
        if self.kind == "norms":
            # Sums over a few thousand rows are as good as exact in float32; those over all rows are not.
            squares = rows.square().sum(0).double()
            self.sums[linear] = self.sums[linear] + squares if linear in self.sums else squares
            return
        if linear not in self.sums:
            self.sums[linear] = rows.new_zeros(rows.shape[1], rows.shape[1])
        add_products(self.sums[linear], rows)

    def result(self) -> Inputs:
        if self.kind == "gram":
            for products in self.sums.values():
                mirror(products)
        values = {name: s.sqrt().float() if self.kind == "norms" else s for name, s in self.sums.items()}
        return Inputs(self.kind, values, self.leaders)


@contextmanager
def _hooked(linears: Mapping[str, torch.nn.Linear], collector: _Collector, whole: bool) -> Iterator[None]:
    """Show every linear layer's input to the collector; unless `whole`, leave the block after the last."""
    last = list(linears)[-1]

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def see(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            collector.see(name, arguments[0])
            if name == last and not whole:
                raise _Seen

        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
