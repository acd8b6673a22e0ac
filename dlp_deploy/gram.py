"""The Gram matrix X^T X of a layer's inputs, and the Cholesky factor of its inverse in the same memory.

A wide layer's matrix is the largest thing in memory while a model is pruned or rounded (LLaMA2-7B's
down_proj: 0.45 GiB), so nothing here makes a second one. What must be kept of it meanwhile is packed.
"""

from __future__ import annotations

import torch

from .errors import UserError

DAMPING = 0.01
# Columns, or rows, that are moved at a time.
PANEL = 128
# Columns that are multiplied at a time.
WIDE_PANEL = 512


def add_products(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X of `rows` float32 [tokens, in] to the lower triangle of `gram` [in, in].

    What is above it is for `mirror` to fill in, once: this is nearly half of the work of a whole product.
    """
    for start in range(0, len(gram), WIDE_PANEL):
        columns = slice(start, start + WIDE_PANEL)
        gram[start:, columns].addmm_(rows[:, start:].T, rows[:, columns])


def mirror(gram: torch.Tensor) -> None:
    """Copy the lower triangle of a matrix to the upper one."""
    for start in range(0, len(gram), PANEL):
        stop = start + PANEL
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        gram[start:stop, stop:] = gram[stop:, start:stop].T


def inverse_factor(gram: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse of the damped Gram matrix [in, in] (SparseGPT, section 3.3).

    It takes the place of `gram`, which is used up; `order` int64 [in] takes rows and columns in another order
    first. With J the reversal of rows, J G J = L L^T gives G^-1 = U^T U for U = J L^-1 J: one factor and the
    inverse of a triangle, and never G^-1 itself, which loses digits. Raises UserError when the matrix cannot
    be inverted even with tenfold damping.
    """
    before: list[torch.Tensor] | None = packed(gram)
    backward = torch.arange(len(gram), device=gram.device) if order is None else order
    for damping in (DAMPING, 10 * DAMPING):
        _reorder(gram, backward.flip(0))
        damp(gram, damping)
        if _became_its_factor(gram):
            before = None
            _invert_triangle(gram)
            _reverse(gram.view(-1))
            return gram
        assert before is not None
        unpack(before, gram)
    raise UserError(
        "the activations are too degenerate for SparseGPT and GPTQ; use more calibration text, or what does "
        "without: prune --method wanda, export --rounding nearest"
    )


def packed(gram: torch.Tensor) -> list[torch.Tensor]:
    """A copy of a symmetric matrix [n, n] in half its memory: its lower triangle, in panels of columns."""
    return [gram[start:, start : start + PANEL].clone() for start in range(0, len(gram), PANEL)]


def unpack(panels: list[torch.Tensor], gram: torch.Tensor) -> None:
    """Put the matrix that was `packed` back into a matrix [n, n]."""
    for start, panel in zip(range(0, len(gram), PANEL), panels, strict=True):
        slab = slice(start, start + PANEL)
        gram[start:, slab] = panel
        gram[slab, start:] = panel.T


def damp(gram: torch.Tensor, damping: float = DAMPING) -> None:
    """Add this share of its mean diagonal to a Gram matrix's diagonal, and 1 for inputs never seen."""
    diagonal = gram.diagonal()
    unseen, mean = (diagonal == 0).to(gram.dtype), diagonal.mean()
    diagonal.add_(unseen).add_(damping * mean)


def _reorder(gram: torch.Tensor, order: torch.Tensor) -> None:
    for rows in gram.split(PANEL):
        rows.copy_(rows[:, order])
    for columns in gram.split(PANEL, dim=1):
        columns.copy_(columns[order])


def _became_its_factor(gram: torch.Tensor) -> bool:
    """Put the lower Cholesky factor of a matrix in its place; where there is none, the matrix is lost."""
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    # LAPACK counts by columns: given rows, it would work on a copy. Here the two are the same matrix.
    columns = gram.mT
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, failed))
    return int(failed) == 0


def _invert_triangle(lower: torch.Tensor) -> None:
    """Put the inverse of a lower triangle in its place: of its quarters, and what they make of the third."""
    size = len(lower)
    if size <= PANEL:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = size // 2
    first, second, between = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_triangle(first)
    _invert_triangle(second)
    torch.mm((second @ between).neg_(), first, out=between)


def _reverse(values: torch.Tensor) -> None:
    """Reverse a vector in place, a part at a time."""
    count, step = len(values), 1 << 20
    for start in range(0, count // 2, step):
        end = min(start + step, count // 2)
        front, back = values[start:end], values[count - end : count - start]
        moved = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(moved)
