"""A checkpoint as a transformers model in memory, to be trained or to teach."""

from __future__ import annotations

from typing import Any

import torch

from ..blocks import BlockModel
from ..checkpoint import open_checkpoint
from ..errors import UserError
from ..families import Outline
from ..models import ModelFiles, load_tokenizer
from ..weightless import model_without_weights


def load_model(files: ModelFiles, linears: torch.dtype | None) -> Any:
    """The model with all its weights: float32, but the block linears in the dtype `linears`.

    None leaves these in their stored dtype. Nothing requires gradients. Raises UserError when config and
    checkpoint disagree.
    """
    checkpoint = open_checkpoint(files)
    described = BlockModel(files, checkpoint)
    model: Any = model_without_weights(described.config)
    state = {name: checkpoint.tensor(name) for name in described.names()}
    for name, tensor in state.items():
        if not is_block_linear(name, described.decoder):
            state[name] = tensor.float()
        elif linears is not None:
            state[name] = tensor.to(linears)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config.use_cache = False
    return model


def is_block_linear(name: str, decoder: Outline) -> bool:
    """Whether a tensor is the weight of a prunable linear layer."""
    family = decoder.family
    return name.startswith(f"{family.blocks}.") and name.endswith(
        tuple(f".{linear}.weight" for linear in family.linears)
    )


def load_teacher(files: ModelFiles, tokenizer: Any, dtype: torch.dtype) -> Any:
    """A model to learn from. Raises UserError when its tokens are not those of `tokenizer`."""
    if load_tokenizer(files).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--teacher {files.location} has another vocabulary; give the dense model that was pruned"
        )
    return load_model(files, dtype)
