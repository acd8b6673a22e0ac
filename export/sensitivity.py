"""Which linear layers lose most by quantization, so that a few of them can stay in fp32.

Every layer of a block is rounded alone, and the block is run: what counts is how far the residual stream
moves, as a share of its size. The head is measured by its logits. No gradients, one block in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..blocks import Block, BlockModel
from ..checkpoint import Checkpoint
from ..errors import UserError
from ..hidden import HiddenStates
from ..models import ModelFiles
from ..progress import progress
from .calibrated import rounded_inputs, rounded_per_token
from .decoder import Weights
from .quantize import Grid, quantize

# Windows of the quantization text that are enough to tell layers apart.
WINDOWS = 4
# By how much the weights may grow.
SHARE = 0.05
FP32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """What rounding a `layer` of so many weights does: `error` is the mean squared change of the residual
    stream (of the logits, for the head) over its mean square."""

    layer: str
    error: float
    weights: int


def measure_costs(
    files: ModelFiles, checkpoint: Checkpoint, ids: torch.Tensor, grid: Grid, token_scales: bool
) -> list[Cost]:
    """The cost of rounding each linear layer alone, in the model's order.

    `ids` int64 [windows, length]; `token_scales` rounds a layer's inputs too, to int8 per token.
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
            prefix = decoder.family.block(index)
            states = hidden.read(slice(0, len(ids))).to(model.device)
            exact = block.run(states)
            for name, linear in block.linears.items():
                with _rounded_alone(block, name, grid, token_scales):
                    error = _relative(block.run(states), exact)
                costs.append(Cost(f"{prefix}.{name}", error, linear.weight.numel()))
            hidden.write(slice(0, len(ids)), exact)
            advance()
        costs.append(_cost_of_head(model, hidden, grid, token_scales))
    return costs


def choose_kept(costs: Sequence[Cost], grid: Grid, share: float = SHARE) -> tuple[str, ...]:
    """Layers to keep in fp32: those that lose most for their size, while the weights grow by `share`."""
    left = share * sum(cost.weights for cost in costs) * grid.stored_bytes
    kept = []
    for cost in sorted(costs, key=lambda cost: cost.error / cost.weights, reverse=True):
        extra = cost.weights * (FP32_BYTES - grid.stored_bytes)
        if extra <= left:
            kept.append(cost.layer)
            left -= extra
    return tuple(sorted(kept))


def named_layers(patterns: str, layers: Iterable[str]) -> tuple[str, ...]:
    """The layers that match one of the comma-separated patterns, such as lm_head or model.layers.0.*.

    Raises UserError for a pattern that matches nothing.
    """
    layers = list(layers)
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise UserError(f"--keep-fp32 {pattern} matches no linear layer; there are e.g. {layers[0]}")
    return tuple(layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in wanted))


@contextmanager
def _rounded_alone(block: Block, name: str, grid: Grid, token_scales: bool) -> Iterator[None]:
    linear = block.linears[name]
    weight = linear.weight
    rounded = torch.from_numpy(quantize(weight.numpy(force=True), grid).dequantize()).to(weight.device)
    linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
    try:
        with rounded_inputs({name: linear} if token_scales else {}):
            yield
    finally:
        linear.weight = weight


@torch.no_grad()
def _cost_of_head(model: BlockModel, hidden: HiddenStates, grid: Grid, token_scales: bool) -> Cost:
    head = model.decoder.family.head
    weight = Weights(model.checkpoint, model.decoder).linear(head)
    exact, rounded = (torch.from_numpy(w) for w in (weight, quantize(weight, grid).dequantize()))
    states = next(iter(model.final_states(hidden)))
    logits = states @ exact.T
    moved = (rounded_per_token(states) if token_scales else states) @ rounded.T
    # A softmax does not see what is added to all logits.
    error = _relative(*(x - x.mean(-1, keepdim=True) for x in (moved, logits)))
    return Cost(head, error, weight.size)


def _relative(moved: torch.Tensor, exact: torch.Tensor) -> float:
    return float((moved - exact).square().mean() / exact.square().mean())
