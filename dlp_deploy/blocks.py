"""Run a transformers model block by block, with the weights of one decoder block in memory.

The model is built without weights by its own transformers class, and each block runs that class's code. What
a block is called with besides the hidden states (rotary embeddings, attention mask) is caught from the
model's own forward pass, as in the code of SparseGPT and Wanda, so no family needs code of its own here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, open_checkpoint, untied_checkpoint
from .errors import UserError
from .families import Decoder, Family
from .hidden import HiddenStates, window_batches
from .models import ModelFiles, load_config
from .outline import outline_of
from .threads import map_in_threads
from .weightless import model_without_weights

# Arguments and keywords that a block is called with besides the hidden states.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """One decoder block with its weights, in float32, and what it is called with for so many windows.

    `linears` have weights [out, in], which are views of those of `module`.
    """

    module: nn.Module
    linears: dict[str, nn.Linear]
    call: Callable[[int], Call]

    @torch.no_grad()
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [windows, length, hidden] after this block."""
        arguments, keywords = self.call(len(hidden))
        output = self.module(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output


class BlockModel:
    """A causal language model whose decoder blocks are brought into memory one at a time."""

    def __init__(self, files: ModelFiles, checkpoint: Checkpoint, device: str = "cpu") -> None:
        """Build the model without weights. Raises UserError when config and checkpoint disagree."""
        self.config = load_config(files)
        self.decoder = outline_of(self.config)
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._model = model_without_weights(self.config)
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        family = self.decoder.family
        check_fits(self._shapes, checkpoint)
        _refuse_strays(self._shapes, checkpoint, family)
        self._blocks: nn.ModuleList = self._model.get_submodule(family.blocks)  # type: ignore[assignment]
        self._base = self._model.get_submodule(family.blocks.rpartition(".")[0])
        self._load_outside()

    def names(self) -> list[str]:
        """Names of the model's tensors; a tied head is not among them."""
        return list(self._shapes)

    def block_names(self, index: int) -> list[str]:
        """Names of the tensors of one decoder block."""
        prefix = self.decoder.family.block(index) + "."
        return [name for name in self._shapes if name.startswith(prefix)]

    def outside_names(self) -> list[str]:
        """Names of the tensors outside the decoder blocks: embeddings, final norm, head."""
        return [name for name in self._shapes if not name.startswith(self.decoder.family.blocks + ".")]

    def linear_weights(self, index: int) -> dict[str, str]:
        """Prunable linear layers of a block, in forward order: name in the block -> name of the weight."""
        block = self.decoder.family.block(index)
        return {linear: f"{block}.{linear}.weight" for linear in self.decoder.family.linears}

    def as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] of a block's linear layer as the checkpoint has it, and the other way round."""
        return matrix.T if self.decoder.family.transposed else matrix

    def prunable_weights(self) -> list[int]:
        """How many weights of each block can be pruned."""
        counts = (self.linear_weights(index).values() for index in range(self.decoder.blocks))
        return [sum(torch.Size(self._shapes[name]).numel() for name in names) for names in counts]

    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

    def head(self) -> tuple[str, torch.Tensor]:
        """Name and weight [vocabulary, hidden] of the head, as stored: of a tied one, the embedding."""
        name = f"{self.decoder.family.head}.weight"
        return name, untied_checkpoint(self.checkpoint, self.decoder.family).tensor(name)

    def read_block(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a block in their stored dtype, by their names in the checkpoint."""
        names = self.block_names(index)
        return dict(zip(names, map_in_threads(self.checkpoint.tensor, names), strict=True))

    def block(self, index: int, tensors: Mapping[str, torch.Tensor], length: int) -> Block:
        """Decoder block `index` with these weights, ready for windows of `length` tokens."""
        prefix = self.decoder.family.block(index) + "."
        state = {
            name.removeprefix(prefix): tensor.to(self.device, torch.float32)
            for name, tensor in tensors.items()
        }
        module = copy.deepcopy(self._blocks[index])
        module.load_state_dict(state, assign=True)
        if self.decoder.family.transposed:
            _use_linears(module, self.decoder.family.linears)
        linears = {name: module.get_submodule(name) for name in self.decoder.family.linears}

        @cache
        def call(windows: int) -> Call:
            # ALiBi's biases have a row for every window; what else there is serves any number of them.
            return self._calls(length, windows)[index]

        return Block(module, linears, call)  # type: ignore[arg-type]

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """What enters the first block, float32 [some windows, length, hidden], for ids [windows, length]."""
        family = self.decoder.family
        used, compact = ids.unique(return_inverse=True)
        if used[-1] >= self.decoder.vocabulary:
            raise UserError(
                f"{self.checkpoint.location}: token {int(used[-1])} of its tokenizer is beyond the "
                f"vocabulary of {self.decoder.vocabulary}; the tokenizer is of another model"
            )
        rows = self.checkpoint.tensor(f"{family.embedding}.weight")[used].to(self.device, torch.float32)
        for windows in window_batches(*ids.shape):
            yield windows, self._first_hidden(compact[windows], rows)

    @torch.no_grad()
    def logits(self, hidden: HiddenStates) -> Iterator[torch.Tensor]:
        """Logits float32 [length, vocabulary] of each window, from the hidden states after the last block."""
        family = self.decoder.family
        tied = self.decoder.tied_embeddings
        name = f"{family.embedding if tied else family.head}.weight"
        head = self.checkpoint.tensor(name).to(self.device, torch.float32)
        if not isinstance(self.decoder, Decoder):
            yield from self._logits_of_class(hidden, head)
            return
        cap = self.decoder.logit_cap
        for states in self.final_states(hidden):
            logits = states @ head.T
            yield logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def final_states(self, hidden: HiddenStates) -> Iterator[torch.Tensor]:
        """What enters the head, float32 [length, hidden] of each window: the states after the final norm."""
        described = isinstance(self.decoder, Decoder)
        norm = self._model.get_submodule(self.decoder.family.final_norm)
        for window in range(hidden.shape[0]):
            states = hidden.read(slice(window, window + 1)).to(self.device)
            yield norm(states[0]) if described else self._before_head(states)

    def _logits_of_class(self, hidden: HiddenStates, weight: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits by the class's own code behind the blocks, which may add a bias, or scale them."""
        head = self._model.get_submodule(self.decoder.family.head)
        without, head.weight = head.weight, nn.Parameter(weight, requires_grad=False)
        try:
            for window in range(hidden.shape[0]):
                yield self._behind_blocks(hidden.read(slice(window, window + 1)).to(self.device)).logits[0]
        finally:
            head.weight = without

    def _before_head(self, states: torch.Tensor) -> torch.Tensor:
        """What enters the head, [length, hidden], for states [1, length, hidden] behind the blocks."""
        caught: list[torch.Tensor] = []

        def catch(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.append(inputs[0])
            raise _Caught

        head = self._model.get_submodule(self.decoder.family.head)
        handle = head.register_forward_pre_hook(catch)
        try:
            self._behind_blocks(states)
        except _Caught:
            pass
        finally:
            handle.remove()
        return caught[0][0]

    def _behind_blocks(self, states: torch.Tensor) -> Any:
        """What the whole model returns when `states` [1, length, hidden] leave its last block."""
        passed = (states,) if self.decoder.family.returns_tuple else states
        ids = torch.zeros(1, states.shape[1], dtype=torch.int64)
        return self._call(self._model, ids, self._blank_row(), lambda *_, **__: passed)

    def _blank_row(self) -> torch.Tensor:
        """The embedding of the only token, where it does not matter which tokens there are."""
        return torch.zeros(1, self.decoder.hidden, device=self.device)

    def _load_outside(self) -> None:
        """Give weights to what is outside the blocks and small: all but embedding and head."""
        family = self.decoder.family
        large = (f"{family.embedding}.weight", f"{family.head}.weight")
        for name in self.outside_names():
            if name not in large:
                tensor = self.checkpoint.tensor(name).to(self.device, torch.float32)
                self._set_parameter(name, tensor)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    def _set_parameter(self, name: str, tensor: torch.Tensor) -> None:
        module, _, local = name.rpartition(".")
        setattr(self._model.get_submodule(module), local, nn.Parameter(tensor, requires_grad=False))

    def _calls(self, length: int, windows: int) -> list[Call]:
        """What each block is called with besides the hidden states, for `windows` of `length` tokens."""
        calls: list[Call] = []

        def record(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            calls.append((arguments, keywords))
            if len(calls) == self.decoder.blocks:
                raise _Caught
            return (hidden,) if self.decoder.family.returns_tuple else hidden

        ids = torch.zeros(windows, length, dtype=torch.int64)
        with suppress(_Caught):
            self._call(self._base, ids, self._blank_row(), record)
        return calls

    def _first_hidden(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            caught.append(hidden)
            raise _Caught

        with suppress(_Caught):
            self._call(self._base, ids, rows, record)
        return caught[0]

    def _call(self, model: nn.Module, ids: torch.Tensor, rows: torch.Tensor, block: Any) -> Any:
        """Run `model` with `block` for each of its decoder blocks and `rows` as its embedding matrix."""
        embedding: Any = self._model.get_submodule(self.decoder.family.embedding)
        before = embedding.weight, embedding.padding_idx
        embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
        try:
            with _replaced_forward(self._blocks, block), torch.no_grad():
                return model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            embedding.weight, embedding.padding_idx = before


class _Caught(Exception):
    """Leaves the model's forward pass once all is known that was wanted of it."""


@contextmanager
def _replaced_forward(blocks: nn.ModuleList, forward: Any) -> Iterator[None]:
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _use_linears(block: nn.Module, layers: Sequence[str]) -> None:
    """Put a linear layer in place of each Conv1D, whose weight [in, out] it shares."""
    for layer in layers:
        stored: Any = block.get_submodule(layer)
        inputs, outputs = stored.weight.shape
        linear = nn.Linear(inputs, outputs, device="meta")
        linear.weight = nn.Parameter(stored.weight.detach().T, requires_grad=False)
        linear.bias = stored.bias
        parent, _, name = layer.rpartition(".")
        setattr(block.get_submodule(parent), name, linear)


def check_fits(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Raise UserError unless the checkpoint has every tensor of the model, in its shape."""
    stored = set(checkpoint.names())
    for name, shape in shapes.items():
        if name not in stored:
            raise UserError(
                f"{checkpoint.location}: config.json calls for tensor {name}, which is in no weight file"
            )
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.file(name)}: tensor {name} is {list(checkpoint.shape(name))}, "
                f"but config.json says {list(shape)}"
            )


def _refuse_strays(shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, family: Family) -> None:
    """Raise UserError for a weight of the blocks that the model has no place for."""
    stored = set(checkpoint.names())
    for name in stored - set(shapes):
        # Other names, and biases without weights, are of buffers that old releases of transformers stored.
        module, _, kind = name.rpartition(".")
        stray = kind in ("weight", "bias") and f"{module}.weight" in stored
        if stray and name.startswith(f"{family.blocks}."):
            raise UserError(f"{checkpoint.file(name)}: config.json has no place for tensor {name}")


def logits_of(
    files: ModelFiles, ids: torch.Tensor, device: str = "cpu", checkpoint: Checkpoint | None = None
) -> Iterator[torch.Tensor]:
    """Logits float32 [length, vocabulary] of each of the token windows `ids`, int64 [windows, length].

    One decoder block is in memory at a time, and the hidden states are in a temporary file. `checkpoint`
    stands in for the weights in `files`.
    """
    model = BlockModel(files, checkpoint or open_checkpoint(files), device)
    with TemporaryDirectory(prefix="dlp-deploy-") as folder:
        hidden = HiddenStates(Path(folder) / "hidden", (*ids.shape, model.decoder.hidden))
        for windows, states in model.embed(ids):
            hidden.write(windows, states)
        for index in range(model.decoder.blocks):
            block = model.block(index, model.read_block(index), ids.shape[1])
            for windows in hidden.batches():
                hidden.write(windows, block.run(hidden.read(windows).to(model.device)))
        yield from model.logits(hidden)
