"""Keeping pruned weights at zero while the others are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..families import Family
from ..recipes.masks import Masks

# uint8 rather than bool: multiplying floats by it is twice as fast, in as little memory.
KEEP = "keep"


def attach_masks(model: Any, masks: Masks) -> None:
    """Give each masked linear layer its keep-mask, a buffer "keep" uint8 [out, in] that is not saved; but not
    the head, which is not trained."""
    for name in masks.names():
        layer = model.get_submodule(name.removesuffix(".weight"))
        if layer is model.get_output_embeddings():
            continue
        layer.register_buffer(KEEP, masks.mask(name).to(torch.uint8), persistent=False)


def masked_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers that `attach_masks` gave a mask."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, KEEP):
            yield module


def train_blocks(model: nn.Module, family: Family) -> None:
    """Let everything in the decoder blocks and the final norm be trained: linear layers, biases, norms.

    Embedding and head stay as they are. They are seldom pruned, and tuning them on little text costs more
    (a step over the whole vocabulary) than it recovers.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((f"{family.blocks}.", f"{family.final_norm}.")))


def mask_gradients(model: nn.Module) -> None:
    """Zero the gradients of pruned weights as soon as they are accumulated.

    Done here and not before the optimizer's step, so that the norm by which gradients are clipped counts
    kept weights only.
    """
    for layer in masked_layers(model):
        layer.weight.register_post_accumulate_grad_hook(_masking(layer))


def _masking(layer: nn.Linear) -> Any:
    def mask(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        weight.grad.mul_(layer.get_buffer(KEEP))

    return mask


class HoldMasks(TrainerCallback):
    """Applies the masks again after every step of the optimizer, whatever the optimizer did."""

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in masked_layers(kwargs["model"]):
            layer.weight.mul_(layer.get_buffer(KEEP))
