"""Models of transformers without their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from .errors import UserError, first_line
from .families import is_described


def model_without_weights(config: Any) -> nn.Module:
    """The transformers model, its parameters without storage and frozen, its buffers real."""
    with _parameters_on_meta():
        return model_of(config)


def model_of(config: Any) -> nn.Module:
    """The transformers model in float32. Raises UserError when the config describes none."""
    try:
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), dtype=torch.float32
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"config.json describes no model: {first_line(error)}") from None
    return model.eval()


def _attention(config: Any) -> str | None:
    # The faster one leaves out the cap of attention scores without a word.
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"
    # Not every class has it; transformers knows which do.
    return "sdpa" if is_described(config) else None


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
