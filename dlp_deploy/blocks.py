"""Run a transformers model block by block, with the weights of one decoder block in memory.

The model is built without weights by its own transformers class, and each block runs that class's code. What
a block is called with besides the hidden states (rotary embeddings, attention mask) is caught from the
model's own forward pass, as in the code of SparseGPT and Wanda, so no family needs code of its own here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .checkpoint import Checkpoint, open_checkpoint
from .errors import UserError, first_line
from .families import Decoder, Family, decoder_of
from .hidden import HiddenStates, window_batches
from .models import ModelFiles, load_config
from .threads import map_in_threads


@dataclass(frozen=True)
class Block:
    """One decoder block with its weights, in float32, and the arguments that it is called with."""

    module: nn.Module
    linears: dict[str, nn.Linear]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @torch.no_grad()
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [windows, length, hidden] after this block."""
        output = self.module(hidden, *self.arguments, **self.keywords)
        return output[0] if isinstance(output, tuple) else output


class BlockModel:
    """A causal language model whose decoder blocks are brought into memory one at a time."""

    def __init__(self, files: ModelFiles, checkpoint: Checkpoint, device: str = "cpu") -> None:
        """Build the model without weights. Raises UserError when config and checkpoint disagree."""
        self.config = load_config(files)
        self.decoder = decoder_of(self.config)
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._model = model_without_weights(self.config, self.decoder)
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

    def prunable_weights(self) -> list[int]:
        """How many weights of each block can be pruned."""
        counts = (self.linear_weights(index).values() for index in range(self.decoder.blocks))
        return [sum(torch.Size(self._shapes[name]).numel() for name in names) for names in counts]

    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values())

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
        linears = {name: module.get_submodule(name) for name in self.decoder.family.linears}
        arguments, keywords = self._calls(length)[index]
        return Block(module, linears, arguments, keywords)  # type: ignore[arg-type]

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
        cap = self.decoder.logit_cap
        for states in self.final_states(hidden):
            logits = states @ head.T
            yield logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.no_grad()
    def final_states(self, hidden: HiddenStates) -> Iterator[torch.Tensor]:
        """What enters the head, float32 [length, hidden] of each window: the states after the final norm."""
        norm = self._model.get_submodule(self.decoder.family.final_norm)
        for window in range(hidden.shape[0]):
            yield norm(hidden.read(slice(window, window + 1))[0].to(self.device))

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

    def _calls(self, length: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each block is called with besides the hidden states, for one window of `length` tokens."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            calls.append((arguments, keywords))
            if len(calls) == self.decoder.blocks:
                raise _Caught
            return hidden

        rows = torch.zeros(1, self.decoder.hidden, device=self.device)
        self._call(torch.zeros(1, length, dtype=torch.int64), rows, record)
        return calls

    def _first_hidden(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        caught: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            caught.append(hidden)
            raise _Caught

        self._call(ids, rows, record)
        return caught[0]

    def _call(self, ids: torch.Tensor, rows: torch.Tensor, block: Any) -> None:
        """Run the model with `block` for each of its decoder blocks and `rows` as its embedding matrix."""
        embedding: Any = self._model.get_submodule(self.decoder.family.embedding)
        before = embedding.weight, embedding.padding_idx
        embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
        try:
            with _replaced_forward(self._blocks, block), torch.no_grad():
                self._base(input_ids=ids.to(self.device), use_cache=False)
        except _Caught:
            pass
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


def model_without_weights(config: Any, decoder: Decoder) -> nn.Module:
    """The transformers model, its parameters without storage and frozen, its buffers real."""
    # The faster one leaves out the cap of attention scores without a word.
    attention = "sdpa" if decoder.attention_cap is None else "eager"
    with _parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32
            )
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"config.json describes no model: {first_line(error)}") from None
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Give new modules parameters without storage. Buffers, such as rotary frequencies, are real.

    `torch.device("meta")` would take the buffers too, and each family computes them in its own way.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one must stay the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


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
    for name in checkpoint.names():
        # Other names are of buffers that old releases of transformers stored.
        stray = name.startswith(f"{family.blocks}.") and name.endswith((".weight", ".bias"))
        if stray and name not in shapes:
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
