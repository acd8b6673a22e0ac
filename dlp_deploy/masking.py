"""Which weights of one matrix to keep, and for SparseGPT what the kept ones become.

Weights are float32 [out, in]; keep-masks are bool of the same shape, True where a weight stays. Each method
compares weights within the group that its paper has: magnitude over the matrix, Wanda within an output
row, SparseGPT within a slab of 128 input columns, and N:M patterns within M inputs of a row.

Counts are exact: a matrix of n weights keeps round(n * (1 - sparsity)) of them in every method. Wanda's
rows, and SparseGPT's slabs, differ by at most one weight in what they keep.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .errors import UserError
from .gram import inverse_factor
from .selection import largest_of_rows
from .threads import map_in_threads

SLAB = 128
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere (`group` None), or `pruned` of every `group` inputs of a row.

    `pruned` None with a group leaves the number to each block's sparsity (DLP's mixed N:8).
    """

    text: str
    pruned: int | None = None
    group: int | None = None

    def for_sparsity(self, sparsity: float) -> tuple[int, int] | None:
        """(pruned, group) for a block of this sparsity, or None when zeros may be anywhere."""
        if self.group is None:
            return None
        return (round(sparsity * self.group) if self.pruned is None else self.pruned, self.group)


def parse_pattern(text: str) -> Pattern:
    """Read "unstructured", "2:4" (prune 2 of every 4), or "N:8" (mixed: as the block's sparsity says)."""
    if text == "unstructured":
        return Pattern(text)
    match = re.fullmatch(r"(N|\d+):(\d+)", text)
    if match is None:
        raise UserError(
            f"unknown pattern {text!r}; use unstructured, N:M such as 2:4 or 4:8, or the mixed N:8"
        )
    group = int(match[2])
    pruned = None if match[1] == "N" else int(match[1])
    if not 2 <= group <= SLAB or SLAB % group or (pruned is not None and not 0 < pruned < group):
        raise UserError(f"pattern {text} is impossible: of M = 2, 4, 8 ... {SLAB} weights prune 0 < N < M")
    return Pattern(text, pruned, group)


@dataclass(frozen=True)
class Pruned:
    """Outcome for one matrix: the keep-mask, and new weights (zero where it is False) if kept ones change."""

    keep: torch.Tensor
    weight: torch.Tensor | None = None


def kept_of(weights: int, sparsity: float) -> int:
    """How many of so many weights are kept."""
    return int(weights * (1.0 - sparsity) + 0.5)


def magnitude_keep(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep the largest |W| of the whole matrix."""
    return _largest(weight.abs(), kept_of(weight.numel(), sparsity))


def wanda_keep(weight: torch.Tensor, norms: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep the largest |W_ij| * ||X_j|| of each output row (Wanda, section 3). `norms` is [in]."""
    rows = len(weight)
    kept, with_one_more = divmod(kept_of(weight.numel(), sparsity), rows)
    values, scale = weight.cpu().numpy(), norms.cpu().numpy()
    keep = np.empty(weight.shape, dtype=np.bool_)

    def keep_rows(some: slice, count: int) -> None:
        metric = np.abs(values[some])
        metric *= scale
        keep[some] = largest_of_rows(metric, count)

    map_in_threads(lambda rows: keep_rows(*rows), _row_slices(rows, with_one_more, kept))
    return torch.from_numpy(keep).to(weight.device)


def _row_slices(rows: int, with_one_more: int, kept: int) -> Iterator[tuple[slice, int]]:
    """Slices of a few rows with what each row keeps: one more in the first rows."""
    for start, end, count in ((0, with_one_more, kept + 1), (with_one_more, rows, kept)):
        for first in range(start, end, ROWS_AT_ONCE):
            yield slice(first, min(first + ROWS_AT_ONCE, end)), count


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` largest of all `values`."""
    keep = largest_of_rows(values.reshape(1, -1).cpu().numpy(), count)
    return torch.from_numpy(keep).reshape(values.shape).to(values.device)


def structured_keep(metric: torch.Tensor, pruned: int, group: int) -> torch.Tensor:
    """Keep all but the `pruned` smallest of every `group` neighbours of a row."""
    groups = metric.reshape(metric.shape[0], -1, group)
    smallest = groups.topk(pruned, dim=2, largest=False, sorted=False).indices
    keep = torch.ones(groups.shape, dtype=torch.bool, device=metric.device)
    return keep.scatter_(2, smallest, False).reshape(metric.shape)


def prune_magnitude(
    weight: torch.Tensor, inputs: torch.Tensor | None, sparsity: float, pattern: Pattern
) -> Pruned:
    structure = pattern.for_sparsity(sparsity)
    if structure is None:
        return Pruned(magnitude_keep(weight, sparsity))
    return Pruned(structured_keep(weight.abs(), *structure))


def prune_wanda(
    weight: torch.Tensor, inputs: torch.Tensor | None, sparsity: float, pattern: Pattern
) -> Pruned:
    """`inputs` are the input norms [in]."""
    assert inputs is not None
    structure = pattern.for_sparsity(sparsity)
    if structure is None:
        return Pruned(wanda_keep(weight, inputs, sparsity))
    return Pruned(structured_keep(weight.abs() * inputs, *structure))


def prune_sparsegpt(
    weight: torch.Tensor, inputs: torch.Tensor | None, sparsity: float, pattern: Pattern
) -> Pruned:
    """SparseGPT (arXiv 2301.00774, algorithm 1). `inputs` is X^T X, [in, in]; it is not altered.

    Raises UserError when X^T X cannot be inverted even with tenfold damping.
    """
    assert inputs is not None
    weight = weight.clone()
    structure = pattern.for_sparsity(sparsity)
    weight[:, inputs.diagonal() == 0] = 0
    factor = inverse_factor(inputs.clone())
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    starts = range(0, weight.shape[1], SLAB)
    kept = _kept_of_slabs(weight, sparsity)
    for start, count in zip(starts, kept, strict=True):
        slab = slice(start, min(start + SLAB, weight.shape[1]))
        sweep = _Sweep(weight[:, slab].t().contiguous(), factor[slab, slab])
        errors = sweep.run(structure, count)
        weight[:, slab] = sweep.columns.t()
        keep[:, slab] = sweep.keep.t()
        weight[:, slab.stop :] -= errors.t() @ factor[slab, slab.stop :]
    return Pruned(keep, weight)


def _kept_of_slabs(weight: torch.Tensor, sparsity: float) -> list[int]:
    rows, columns = weight.shape
    ends = [min(end, columns) for end in range(0, columns + SLAB, SLAB)]
    kept = [kept_of(rows * end, sparsity) for end in ends]
    return [end - start for start, end in itertools.pairwise(kept)]


class _Sweep:
    """One slab of SparseGPT, column after column. `columns` [slab, out] are the weights, transposed."""

    def __init__(self, columns: torch.Tensor, factor: torch.Tensor) -> None:
        self.columns = columns
        self.factor = factor
        self.keep = torch.ones(columns.shape, dtype=torch.bool, device=columns.device)

    def run(self, structure: tuple[int, int] | None, kept: int) -> torch.Tensor:
        """Prune the slab in place; returns the errors [slab, out] that later slabs must make up for."""
        errors = torch.empty_like(self.columns)
        diagonal = self.factor.diagonal()
        if structure is None:
            self.keep = _largest((self.columns / diagonal[:, None]).square(), kept)
        for index, column in enumerate(self.columns):
            if structure is not None and index % structure[1] == 0:
                self._choose(slice(index, index + structure[1]), structure)
            errors[index] = column.masked_fill(self.keep[index], 0) / diagonal[index]
            column.masked_fill_(~self.keep[index], 0)
            self.columns[index + 1 :] -= torch.outer(self.factor[index, index + 1 :], errors[index])
        return errors

    def _choose(self, group: slice, structure: tuple[int, int]) -> None:
        """Choose an N:M group only when its weights carry the corrections for the columns before it."""
        saliency = (self.columns[group] / self.factor.diagonal()[group, None]).square()
        self.keep[group] = structured_keep(saliency.t(), *structure).t()


@dataclass(frozen=True)
class Method:
    """A pruning method and what it must know of a layer's inputs: nothing, their norms, or X^T X."""

    prune: Callable[[torch.Tensor, torch.Tensor | None, float, Pattern], Pruned]
    inputs: Literal["nothing", "norms", "gram"]


METHODS: dict[str, Method] = {
    "magnitude": Method(prune_magnitude, "nothing"),
    "wanda": Method(prune_wanda, "norms"),
    "sparsegpt": Method(prune_sparsegpt, "gram"),
}


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
