"""The loss over a vocabulary, in chunks of tokens.

The logits of one batch, [tokens, vocabulary] in float32, are the largest tensors of a training step: 400 MB
for 2048 tokens of SmolLM2, several times over. The head is not trained, so only the gradient with respect
to the hidden states is needed, and it is computed chunk by chunk together with the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

CHUNK = 256


@dataclass(frozen=True)
class Head:
    """From states to logits: weight [vocabulary, hidden], and a cap c that limits logits to c tanh(x / c)."""

    weight: torch.Tensor
    cap: float | None = None

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, vocabulary] for states [tokens, hidden]."""
        logits = (states @ self.weight.T).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class Distillation:
    """How much of the loss comes from the teacher: `weight` in [0, 1], at softmax `temperature`."""

    weight: float
    temperature: float


def cross_entropy(states: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood in nats of `targets` int64 [tokens].

    `states` [tokens, hidden] are what enters the head.
    """

    def loss(part: torch.Tensor, rows: slice) -> torch.Tensor:
        return functional.cross_entropy(head.logits(part), targets[rows], reduction="sum")

    return _InChunks.apply(states, loss) / len(targets)


def distilled(
    states: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    teacher_states: torch.Tensor,
    teacher_head: Head,
    how: Distillation,
) -> torch.Tensor:
    """(1 - w) cross-entropy + w T^2 KL(teacher || student), mean over tokens in nats.

    T softens both distributions; T^2 keeps the gradients' size (Hinton et al., arXiv 1503.02531, section 2).
    """

    def loss(part: torch.Tensor, rows: slice) -> torch.Tensor:
        logits = head.logits(part)
        teacher = teacher_head.logits(teacher_states[rows])
        soft = functional.kl_div(
            functional.log_softmax(logits / how.temperature, dim=-1),
            functional.log_softmax(teacher / how.temperature, dim=-1),
            reduction="sum",
            log_target=True,
        )
        total = how.weight * how.temperature**2 * soft
        if how.weight < 1:
            hard = functional.cross_entropy(logits, targets[rows], reduction="sum")
            total = total + (1 - how.weight) * hard
        return total

    return _InChunks.apply(states, loss) / len(targets)


class _InChunks(torch.autograd.Function):
    """Sum of `loss(states[rows], rows)` over chunks of rows; gradients are ready when the loss is."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, loss: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), device=states.device)
        for start in range(0, len(states), CHUNK):
            rows = slice(start, start + CHUNK)
            with torch.enable_grad():
                part = states[rows].detach().requires_grad_()
                value = loss(part, rows)
            (gradient[rows],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None
