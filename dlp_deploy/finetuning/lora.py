"""LoRA adapters that respect a mask: what is trained is what is merged.

Plain LoRA computes W x + s B (A x). B A is dense, so merging it into a pruned W either fills the zeros or,
if the product is masked then, throws away most of what was learned: the model was trained with entries
that the merged one lacks. Here the forward pass uses

    y = (W + s (B A) * mask) x + bias

from the first step, W being zero where the mask is. The merged model therefore computes what the trained
one did, and the gradients of A and B come from kept weights only. The price: each layer forms an [out, in]
product per pass, so a step takes the time of full fine-tuning. What LoRA saves is memory: no gradients or
optimizer states of W.

The adapters are peft's, as are their saving, loading and merging: `MaskedLinear` is peft's own LoRA layer,
registered for nn.Linear through peft's hook for custom layers, with another delta weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from ..families import Family
from .holding import KEEP

SCALING = 2


class MaskedLinear(LoraLinear):
    """peft's LoRA layer over a linear layer with a keep-mask (see `attach_masks`)."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """s (B A) * mask, [out, in] in the adapter's dtype; peft's `merge` adds this to the weight."""
        delta = super().get_delta_weight(adapter)
        keep = getattr(self.get_base_layer(), KEEP, None)
        return delta if keep is None else delta * keep

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return layer(x)
        # Not under autocast: the sum must be the merged weight, not one of rounded parts.
        with torch.autocast(x.device.type, enabled=False):
            weight = layer.weight + sum(self.get_delta_weight(name) for name in self.active_adapters)
        return functional.linear(x, weight, layer.bias)


def with_adapters(model: Any, family: Family, rank: int, config_folder: Path) -> PeftModel:
    """`model` with a masked adapter of `rank` on every linear layer of its blocks; norms are trained whole.

    The adapters' scale s is 2, as for lora_alpha = 2 rank. The model's config goes into `config_folder`:
    peft compares with it when it saves adapters, and would ask the hub otherwise.
    """
    model.config.save_pretrained(config_folder)
    model.name_or_path = str(config_folder)
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALING * rank,
        lora_dropout=0.0,
        target_modules=[linear.rpartition(".")[2] for linear in family.linears],
        modules_to_save=sorted(_norms(model, family)),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({nn.Linear: MaskedLinear})
    return get_peft_model(model, config)


def _norms(model: nn.Module, family: Family) -> set[str]:
    """Last names of the modules that have parameters of their own and are not linear: the norms."""
    inside = (f"{family.blocks}.", f"{family.final_norm}")
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name.startswith(inside)
        and not isinstance(module, nn.Linear)
        and any(True for _ in module.parameters(recurse=False))
    }


def merged(model: PeftModel) -> Any:
    """The transformers model with the adapters merged into its weights, under their masks."""
    return model.merge_and_unload(safe_merge=True)
