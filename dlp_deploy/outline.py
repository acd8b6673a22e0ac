"""The outline of any decoder: from families.py, or for other families read off its transformers class.

The class is built of tensors without storage and run once, which computes shapes and no numbers: its
decoder blocks are the list of as many modules as the config has layers, and their linear layers come in
the order in which they are called. What cannot be read off like that is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from .errors import UserError, first_line
from .families import Family, Outline, architectures_of, decoder_of, is_described
from .weightless import model_of

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
# Any number of tokens shows the shapes.
TOKENS = 8
# By the whole config: reading it off the class takes a second.
_READ: dict[str, Outline] = {}


def outline_of(config: Any) -> Outline:
    """The outline of a model; a `Decoder` where its family is described.

    Raises UserError when the architecture is no decoder, or one that cannot be run block by block.
    """
    if is_described(config):
        return decoder_of(config)
    require_decoder(config)
    settings = config.to_json_string(use_diff=False)
    if settings not in _READ:
        with FakeTensorMode():
            _READ[settings] = _Reader(config, model_of(config)).outline()
    return _READ[settings]


def require_decoder(config: Any) -> None:
    """Raise UserError unless `config` is of a described family, or of any other decoder of transformers."""
    names = architectures_of(config)
    if not is_described(config) and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) not in names:
        raise UserError(
            f"architecture {', '.join(names) or 'unknown'} is not supported; supported are decoders that "
            "transformers has for causal language modeling, such as LlamaForCausalLM"
        )


def untied_config(config: Any) -> Any:
    """The config of the same model with a head that shares no weights with the embedding.

    Raises UserError when its class has no such head.
    """
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    if not (is_described(config) or _has_linear_head(untied)):
        raise UserError(
            f"{architectures_of(config)[0]} cannot have a linear layer with weights of its own as its head, "
            "which is what can be pruned; leave out --head-sparsity"
        )
    return untied


def _has_linear_head(config: Any) -> bool:
    with FakeTensorMode():
        model: Any = model_of(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return isinstance(head, nn.Linear) and head.weight is not embedding.weight


@dataclass
class _Seen:
    """What a pass over the model shows: linear layers of the first block as they are called, what the block
    returns, the hidden size, and the modules called between the last block and the head."""

    linears: list[str] = field(default_factory=list)
    returns_tuple: bool = False
    hidden: int = 0
    behind: list[str] = field(default_factory=list)


class _Reader:
    def __init__(self, config: Any, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.architecture = architectures_of(config)[0]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.blocks = self._find_blocks()
        self.prefix = self.names[id(self.blocks)]

    def outline(self) -> Outline:
        kinds = self._linears_of(self.blocks[0])
        self._require_alike(kinds)
        seen = self._run(kinds)
        if sorted(seen.linears) != sorted(kinds):
            raise self._refusal("not every text goes through each linear layer of a block, once")
        embedding, head = self._outer("get_input_embeddings"), self._outer("get_output_embeddings")
        heads = self._size("num_attention_heads")
        attention = tuple(takewhile(_beside(seen.linears[0]), seen.linears))
        family = Family(
            name=self.config.model_type,
            architectures=(self.architecture,),
            attention=attention,
            mlp=tuple(seen.linears[len(attention) :]),
            blocks=self.prefix,
            embedding=self.names[id(embedding)],
            final_norm=seen.behind[-1] if seen.behind else "",
            head=self.names[id(head)],
            transposed=all(issubclass(kind, Conv1D) for kind in kinds.values()),
            returns_tuple=seen.returns_tuple,
        )
        return Outline(
            family=family,
            blocks=len(self.blocks),
            hidden=seen.hidden,
            intermediate=max(max(self._weight(name).shape) for name in kinds),
            heads=heads,
            kv_heads=getattr(self.config, "num_key_value_heads", None) or heads,
            head_dim=getattr(self.config, "head_dim", None) or seen.hidden // heads,
            vocabulary=len(embedding.weight),
            max_positions=self._size(*POSITIONS),
            norm_epsilon=next((getattr(self.config, e) for e in EPSILONS if hasattr(self.config, e)), 1e-5),
            tied_embeddings=head.weight is embedding.weight,
        )

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.architecture} cannot be pruned block by block: {reason}")

    def _size(self, *names: str) -> int:
        found = (getattr(self.config, name, None) for name in names)
        size = next((value for value in found if value is not None), None)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"config.json: {names[0]} is {size!r}, but must be a positive number")
        return size

    def _outer(self, getter: str) -> Any:
        module = getattr(self.model, getter)()
        if module is None or not hasattr(module, "weight"):
            raise self._refusal("it has no embedding or no head of the usual kind")
        return module

    def _find_blocks(self) -> nn.ModuleList:
        count = self._size("num_hidden_layers")
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count and self._linears_of(module[0]):
                return module
        raise self._refusal(f"it has no list of {count} blocks with linear layers")

    def _linears_of(self, block: nn.Module) -> dict[str, type[nn.Module]]:
        layers = block.named_modules()
        return {name: type(layer) for name, layer in layers if isinstance(layer, (nn.Linear, Conv1D))}

    def _weight(self, linear: str) -> torch.Tensor:
        return self.blocks[0].get_submodule(linear).weight  # type: ignore[return-value]

    def _require_alike(self, kinds: dict[str, type[nn.Module]]) -> None:
        """All blocks must have these linear layers, all of one kind, and no other matrices."""
        shapes = {name: self._weight(name).shape for name in kinds}
        if len({issubclass(kind, Conv1D) for kind in kinds.values()}) > 1:
            raise self._refusal("its linear layers are of two kinds")
        for block in self.blocks:
            matrices = {name: p.shape for name, p in block.named_parameters() if p.ndim > 1}
            if matrices != {f"{name}.weight": shape for name, shape in shapes.items()}:
                raise self._refusal("its blocks differ, or hold matrices that are no linear layers")

    def _run(self, kinds: dict[str, type[nn.Module]]) -> _Seen:
        seen = _Seen()
        try:
            with self._watched(kinds, seen), torch.no_grad():
                self.model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
        except Exception as error:  # the class is not ours, nor is what it raises
            raise self._refusal(f"its forward pass could not be followed ({first_line(error)})") from None
        return seen

    @contextmanager
    def _watched(self, kinds: Sequence[str] | dict[str, Any], seen: _Seen) -> Iterator[None]:
        def called(name: str) -> Callable[..., None]:
            return lambda *_: seen.linears.append(name)

        def left_block(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.returns_tuple = isinstance(output, tuple)
            seen.hidden = (output[0] if seen.returns_tuple else output).shape[-1]
            seen.behind.clear()

        def called_behind(name: str) -> Callable[..., None]:
            return lambda *_: seen.behind.append(name)

        first = self.blocks[0]
        handles = [first.get_submodule(name).register_forward_hook(called(name)) for name in kinds]
        handles += [block.register_forward_hook(left_block) for block in self.blocks]
        base = self.model.get_submodule(self.prefix.rpartition(".")[0])
        handles += [
            module.register_forward_hook(called_behind(self.names[id(module)])) for module in base.children()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _beside(linear: str) -> Callable[[str], bool]:
    """Whether a layer is in the same part of the block: in its attention, if `linear` is."""
    part = linear.partition(".")[0]
    return lambda name: name.partition(".")[0] == part
