"""Weights whose rounding is chosen on text: GPTQ, block after block, as the graph is written.

Each block is fed what the quantized blocks before it make of the text, so it makes up for their errors
too. Only one block is in memory at a time; finished ones are stored, so that this can be resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from ..activations import measure_inputs, measure_rows
from ..blocks import BlockModel
from ..calibration import TokenWindows, calibration_windows
from ..checkpoint import Checkpoint
from ..models import ModelFiles, load_tokenizer
from .decoder import Weights
from .gptq import rounded
from .grid import Grid
from .inputs import Int8Inputs, rounded_inputs
from .quantize import Quantized, grid_scale
from .resumed import RoundedBlocks

WINDOWS = 16
TOKENS_PER_WINDOW = 512


def quantization_text(files: ModelFiles, longest: int, spec: str = "builtin") -> TokenWindows:
    """The windows of text `spec` that smoothing and rounding are measured on, of at most `longest` tokens.

    Raises UserError as `calibration_windows` does, but not for a text that is shorter than a window.
    """
    length = min(TOKENS_PER_WINDOW, longest)
    # One seed for all: what is measured on the same text can be compared, however the model was pruned.
    return calibration_windows(spec, load_tokenizer(files), WINDOWS, length, seed=0, shorter=True)


class CalibratedWeights(Weights):
    """The weights of `checkpoint`, rounded by GPTQ. Layers are asked for in the model's order.

    Where the engine rounds activations to int8, `inputs` says how, and the text is run like that. The
    layers in `kept` stay as they are. Finished blocks are stored in `folder`, and those that are there
    already are not rounded again: they must be of the same checkpoint, text and options.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: ModelFiles,
        ids: torch.Tensor,
        grid: Grid,
        head_grid: Grid,
        inputs: Int8Inputs | None,
        folder: Path,
        kept: Collection[str] = (),
    ) -> None:
        self._model = BlockModel(files, checkpoint)
        super().__init__(checkpoint, self._model.decoder)
        self._ids, self._inputs, self._kept = ids, inputs, kept
        self._grid, self._head_grid = grid, head_grid
        self._blocks = RoundedBlocks(folder, (*ids.shape, self._model.decoder.hidden))
        if not self._blocks.finished:
            first = self._blocks.states(0)
            for windows, states in self._model.embed(ids):
                first.write(windows, states)
        self._next = 0
        self._rounded: dict[str, Quantized] = {}

    @property
    def finished(self) -> int:
        """How many blocks are rounded and stored."""
        return self._blocks.finished

    def quantized(self, layer: str, grid: Grid) -> Quantized:
        while layer not in self._rounded:
            # Not the last block's weights and this one's at once.
            self._rounded = {}
            self._rounded = self._round_next()
        assert grid == self._rounded[layer].grid
        return self._rounded[layer]

    def _round_next(self) -> dict[str, Quantized]:
        """Round the linear layers of the next block or, behind the last one, the head."""
        index, self._next = self._next, self._next + 1
        if index > self._model.decoder.blocks:
            raise KeyError("layers were not asked for in the model's order")
        if index == self._model.decoder.blocks:
            return self._round_head()
        if index == self._blocks.finished:
            self._blocks.append(self._round_block(index))
        return self._blocks.read(index, self._grid)

    @torch.no_grad()
    def _round_block(self, index: int) -> dict[str, Quantized]:
        model, prefix = self._model, self._model.decoder.family.block(index)
        block = model.block(index, model.read_block(index), self._ids.shape[1])
        before, behind = self._blocks.states(index), self._blocks.states(index + 1)
        found: dict[str, Quantized] = {}
        named = {f"{prefix}.{name}": linear for name, linear in block.linears.items()}
        rounding = {layer: linear for layer, linear in named.items() if layer not in self._kept}
        with rounded_inputs(rounding, self._inputs):
            grams = measure_inputs(block, before, "gram", model.device)
            for leader in list(grams.values):
                layers = [f"{prefix}.{name}" for name in grams.sharing(leader)]
                linears = {layer: rounding[layer] for layer in layers if layer in rounding}
                weights = [linear.weight for linear in linears.values()]
                # Taken out, so that it can be given back to memory as soon as it is used up.
                quantized = _round(weights, grams.values.pop(leader), self._grid)
                for (layer, linear), levels in zip(linears.items(), quantized, strict=True):
                    linear.weight.copy_(torch.from_numpy(levels.dequantize()))
                    found[layer] = levels
            for windows in before.batches():
                behind.write(windows, block.run(before.read(windows).to(model.device)))
        return found

    @torch.no_grad()
    def _round_head(self) -> dict[str, Quantized]:
        head = self._model.decoder.family.head
        rows = self._model.final_states(self._blocks.states(self._model.decoder.blocks))
        if self._inputs is not None:
            rows = map(partial(self._inputs.rounded, head), rows)
        gram = measure_rows(rows, "gram")
        (quantized,) = _round([torch.from_numpy(self.linear(head))], gram, self._head_grid)
        return {head: quantized}


def _round(weights: Sequence[torch.Tensor], gram: torch.Tensor, grid: Grid) -> list[Quantized]:
    """Layers that share their inputs, of which `gram` is used up."""
    if not weights:
        return []
    scales = [
        torch.from_numpy(grid_scale(weight.numpy(force=True), grid)).to(weight.device) for weight in weights
    ]
    return [
        Quantized(levels.numpy(force=True), scale.numpy(force=True), grid)
        for levels, scale in rounded(weights, gram, scales, grid)
    ]
