"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) for pruned weights: rounding that makes up for itself.

Input columns are rounded one after the other, and each passes its error on to the columns to come, as
the inputs' covariance says (algorithm 1). Pruned weights are columns whose value is fixed at zero: what
would flow into one flows on. So the mask stays, and the kept weights carry the loss.

Behind SparseGPT this is that paper's joint sparsification and quantization, to the same levels: both sweeps
visit the columns in the same order and correct by the same factor, so that their corrections add up to
those of one sweep that zeroes and rounds at once.
"""

from __future__ import annotations

import torch

from ..masking import SLAB, inverse_factor


@torch.no_grad()
def rounded_levels(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, lowest: int, highest: int
) -> torch.Tensor:
    """Integer levels, int8 [out, in], with weight ~ levels * scale and zero where the weight is zero.

    `weight` float32 [out, in]; `gram` X^T X of the layer's inputs, float32 [in, in]; `scale` float32
    [out, in], or [out, 1] where a channel has one. Raises UserError when `gram` cannot be inverted.
    """
    keep, scale = weight != 0, scale.expand_as(weight)
    left, factor = weight.clone(), inverse_factor(gram)
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, weight.shape[1], SLAB):
        slab = slice(start, min(start + SLAB, weight.shape[1]))
        columns, within = left[:, slab].t().contiguous(), factor[slab, slab]
        errors = torch.empty_like(columns)
        for index, column in enumerate(columns):
            step, kept = scale[:, start + index], keep[:, start + index]
            level = (column / step).round_().clamp_(lowest, highest).mul_(kept)
            levels[:, start + index] = level.to(torch.int8)
            errors[index] = (column - level * step) / within[index, index]
            columns[index + 1 :] -= torch.outer(within[index, index + 1 :], errors[index])
        left[:, slab.stop :] -= errors.t() @ factor[slab, slab.stop :]
    return levels
