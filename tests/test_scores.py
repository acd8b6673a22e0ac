from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dlp_deploy.errors import UserError
from dlp_deploy.scores import STATISTICS, statistic_named, wanda_metric


@pytest.fixture
def block() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Odd shapes, one dead input feature, and a matrix longer than a chunk."""
    torch.manual_seed(0)
    weights = {"q": torch.randn(83, 55), "down": torch.randn(831, 97), "one": torch.randn(1, 3)}
    norms = {name: torch.rand(weight.shape[1]) * 9 for name, weight in weights.items()}
    norms["q"][4] = 0
    return weights, norms


def metric_at_once(weights: dict[str, torch.Tensor], norms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([(weight.abs() * norms[name]).flatten() for name, weight in weights.items()])


REFERENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "median": torch.median,
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.max,
    "std": torch.std,
    "var": torch.var,
    "outliers": lambda metric: (metric > 5 * metric.mean()).double().mean(),
}


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_statistics_are_those_of_the_concatenated_metric(
    name: str, block: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    expected = float(REFERENCES[name](metric_at_once(*block).double()))
    assert statistic_named(name)(wanda_metric(*block)) == pytest.approx(expected, rel=1e-12)


def test_median_equals_torch_to_the_bit(
    block: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    assert STATISTICS["median"](wanda_metric(*block)) == float(torch.median(metric_at_once(*block)))


def test_unknown_statistic() -> None:
    with pytest.raises(UserError, match="unknown statistic 'mode'; there are: median, mean"):
        statistic_named("mode")
