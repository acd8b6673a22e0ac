"""What agrees with a reference, and what a reference is worth that is not sound itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlp_deploy.bench.agreement import Agreement, compare, first_positions
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.plan import Candidate
from dlp_deploy.export.reference import Reference

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(9, 50)).astype(np.float32)
IDS = np.arange(20)


def held(
    precision: str, error: float, graph_error: float | None = 0.01, broken: float | None = None
) -> Agreement:
    """A run whose logits are so far from torch, where those of ONNX Runtime on the same graph are
    `graph_error` away; `broken` takes the place of one of the latter."""
    graph = None
    if graph_error is not None:
        graph = (LOGITS + graph_error * RANDOM.normal(size=LOGITS.shape)).astype(np.float32)
        if broken is not None:
            graph[3, 7] = broken
    engine = engine_named("deepsparse")
    candidate = Candidate("run", engine, precision, False, 0.7, Path(), Path(), 1, "pruned")
    logits = (LOGITS + error * RANDOM.normal(size=LOGITS.shape)).astype(np.float32)
    return compare(candidate, logits, Reference(IDS, 12, LOGITS, graph))


def test_a_quantized_run_may_err_as_its_graph_does_and_hardly_more() -> None:
    assert held("int8", 0.01).holds
    assert not held("int8", 0.03).holds
    assert held("int8", 0.03, graph_error=0.03).holds
    assert held("fp32", 1e-5).holds
    assert not held("fp32", 0.01).holds


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_graph_that_is_not_finite_in_onnxruntime_excuses_nothing(broken: float) -> None:
    found = held("int8", 0.01, broken=broken)
    assert found.graph is None
    assert found.holds
    assert np.isfinite(found.limit)
    assert not held("int8", 3.0, broken=broken).holds
    assert not held("int8", np.nan, broken=broken).holds


def test_of_a_short_context_only_the_positions_that_it_holds_are_compared() -> None:
    whole = Reference(IDS, 12, LOGITS, LOGITS)
    part = first_positions(whole, 15)
    assert part is not None
    assert (len(part.ids), part.prompt, part.logits.shape) == (15, 12, (4, 50))
    np.testing.assert_array_equal(part.graph_logits, LOGITS[:4])
    assert first_positions(whole, 11) is None
