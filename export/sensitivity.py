"""Which linear layers lose most by quantization, so that a few of them can stay in fp32.

The layers of a block that share an input are rounded alone, and the block is run: what counts is how far
the residual stream moves, as a share of its size. The head is measured by its logits. No gradients, one
block in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..blocks import BlockModel
from ..checkpoint import Checkpoint
from ..errors import UserError
from ..hidden import HiddenStates
from ..models import ModelFiles
from ..progress import progress
from .decoder import Weights
from .grid import Grid
from .inputs import Int8Inputs, rounded_inputs
from .quantize import quantize

# Windows of the quantization text that are enough to tell layers apart.
WINDOWS = 4
# By how much the weights may grow.
SHARE = 0.05
FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """What rounding `layers`, of so many weights, does: `error` is the mean squared change of the residual
    stream (of the logits, for the head) over its mean square."""

    layers: tuple[str, ...]
    error: float
    weights: int


def measure_costs(
    files: ModelFiles,
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    grid: Grid,
    head_grid: Grid,
    inputs: Int8Inputs | None,
) -> list[Cost]:
    """The cost of rounding each group of linear layers with one input alone, in the model's order.

    `grid` is that of the blocks. `ids` int64 [windows, length]; `inputs` says how a layer's inputs are
    rounded too, if they are.
    """
    model = BlockModel(files, checkpoint)
    decoder, ids = model.decoder, ids[:WINDOWS]
    costs: list[Cost] = []
    with TemporaryDirectory(prefix="dlp-deploy-") as folder, progress("Measuring", decoder.blocks) as advance:
        hidden = HiddenStates(Path(folder) / "hidden", (*ids.shape, decoder.hidden))
        for windows, states in model.embed(ids):
            hidden.write(windows, states)
        for index in range(decoder.blocks):
            block = model.block(index, model.read_block(index), ids.shape[1])
            prefix = decoder.family.block(index) + "."
            groups = [group for group in decoder.linear_groups() if group[0].startswith(prefix)]
            states = hidden.read(slice(0, len(ids))).to(model.device)
            exact = block.run(states)
            for group in groups:
                linears = {name: block.linears[name.removeprefix(prefix)] for name in group}
                with _rounded_alone(linears, grid, inputs):
                    error = _relative(block.run(states), exact)
                costs.append(Cost(group, error, sum(linear.weight.numel() for linear in linears.values())))
            hidden.write(slice(0, len(ids)), exact)
            advance()
        costs.append(_cost_of_head(model, hidden, head_grid, inputs))
    return costs


def choose_kept(costs: Sequence[Cost], grid: Grid, share: float = SHARE) -> tuple[str, ...]:
    """Layers to keep in fp32: those that lose most for their size, while the weights grow by `share`."""
    left = share * sum(cost.weights for cost in costs) * grid.stored_bytes
    kept: list[str] = []
    for cost in sorted(costs, key=lambda cost: cost.error / cost.weights, reverse=True):
        extra = cost.weights * (FP32_BYTES - grid.stored_bytes)
        if extra <= left:
            kept += cost.layers
            left -= extra
    return tuple(sorted(kept))


def named_layers(patterns: str, groups: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The layers that match one of the comma-separated patterns, such as lm_head or model.layers.0.*.

    Those that share an input with one come with it. Raises UserError for a pattern that matches nothing.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    kept: list[str] = []
    for pattern in wanted:
        found = [group for group in groups if any(fnmatchcase(layer, pattern) for layer in group)]
        if not found:
            raise UserError(f"--keep-fp32 {pattern} matches no linear layer; there are e.g. {groups[0][0]}")
        kept += (layer for group in found for layer in group)
    return tuple(dict.fromkeys(kept))


@contextmanager
def _rounded_alone(
    linears: Mapping[str, torch.nn.Linear], grid: Grid, inputs: Int8Inputs | None
) -> Iterator[None]:
    weights = {name: linear.weight for name, linear in linears.items()}
    for linear in linears.values():
        rounded = torch.from_numpy(quantize(linear.weight.numpy(force=True), grid).dequantize())
        linear.weight = torch.nn.Parameter(rounded.to(linear.weight.device), requires_grad=False)
    try:
        with rounded_inputs(linears, inputs):
            yield
    finally:
        for name, linear in linears.items():
            linear.weight = weights[name]


@torch.no_grad()
def _cost_of_head(model: BlockModel, hidden: HiddenStates, grid: Grid, inputs: Int8Inputs | None) -> Cost:
    head = model.decoder.family.head
    weight = Weights(model.checkpoint, model.decoder).linear(head)
    exact, rounded = (torch.from_numpy(w) for w in (weight, quantize(weight, grid).dequantize()))
    states = next(iter(model.final_states(hidden)))
    logits = states @ exact.T
    moved = (states if inputs is None else inputs.rounded(head, states)) @ rounded.T
    # A softmax does not see what is added to all logits.
    error = _relative(*(x - x.mean(-1, keepdim=True) for x in (moved, logits)))
    return Cost((head,), error, weight.size)


def _relative(moved: torch.Tensor, exact: torch.Tensor) -> float:
    return float((moved - exact).square().mean() / exact.square().mean())
