"""How far two tools agree on which weights to keep."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """Two masks of one weight, compared over the weights that are not zero already in the dense model.

    `ours` and `theirs` are sparsities. Of the `differing` weights, `by_count` differ because the two keep
    different numbers of weights in a row, as each rounds in its own way. The others are swaps within a row:
    two weights of nearly the same metric, between which the order of a summation decides, or a block's
    inputs, which differ a little once an earlier block's masks do.
    """

    name: str
    weights: int
    columns: int
    ours: float
    theirs: float
    differing: int
    by_count: int

    @property
    def equal(self) -> float:
        """Share of the weights on which the masks agree."""
        return 1 - self.differing / self.weights

    @property
    def within_rounding(self) -> bool:
        """Whether the sparsities differ by no more than one weight in every row."""
        return abs(self.ours - self.theirs) <= 1 / self.columns + 1e-12


def compare(name: str, dense: torch.Tensor, keep: torch.Tensor, theirs: torch.Tensor) -> Agreement:
    """Compare our mask `keep` with the weights `theirs` that another tool made of `dense` [rows, columns]."""
    present = dense != 0
    ours_kept = keep & present
    theirs_kept = (theirs != 0) & present
    weights = int(present.sum())
    by_count = (ours_kept.sum(1) - theirs_kept.sum(1)).abs().sum()
    return Agreement(
        name,
        weights,
        dense.shape[1],
        1 - int(ours_kept.sum()) / weights,
        1 - int(theirs_kept.sum()) / weights,
        int((ours_kept != theirs_kept).sum()),
        int(by_count),
    )


@dataclass(frozen=True)
class Summary:
    """Agreement over many weights: medians and worst cases over modules, totals over weights."""

    modules: int
    sparsity_gap_median: float
    sparsity_gap_worst: float
    equal_median: float
    equal_worst: float
    equal: float
    by_count: float
    swapped: float


def summary(agreements: Iterable[Agreement]) -> Summary:
    """`equal`, `by_count` and `swapped` are shares of all weights and add up to 1."""
    rows = list(agreements)
    gaps = [abs(row.ours - row.theirs) for row in rows]
    shares = [row.equal for row in rows]
    weights = sum(row.weights for row in rows)
    differing = sum(row.differing for row in rows)
    by_count = sum(row.by_count for row in rows)
    return Summary(
        len(rows),
        statistics.median(gaps),
        max(gaps),
        statistics.median(shares),
        min(shares),
        1 - differing / weights,
        by_count / weights,
        (differing - by_count) / weights,
    )


def summary_table(columns: Sequence[tuple[str, Summary]]) -> str:
    """Summaries side by side, as a Markdown table."""
    lines = {
        "modules": lambda s: f"{s.modules}",
        "sparsity gap, median": lambda s: f"{s.sparsity_gap_median:.5f}",
        "sparsity gap, worst module": lambda s: f"{s.sparsity_gap_worst:.5f}",
        "equal mask bits, median module": lambda s: f"{s.equal_median:.4%}",
        "equal mask bits, worst module": lambda s: f"{s.equal_worst:.4%}",
        "equal mask bits, all weights": lambda s: f"{s.equal:.4%}",
        "differing by rounding of counts": lambda s: f"{s.by_count:.4%}",
        "differing by swaps within a row": lambda s: f"{s.swapped:.4%}",
    }
    heading = ["", *(name for name, _ in columns)]
    rows = [[label, *(show(value) for _, value in columns)] for label, show in lines.items()]
    table = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
