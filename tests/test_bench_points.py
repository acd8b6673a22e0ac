"""The file of a sweep: what is kept of it, what is dropped, and what it may be called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlp_deploy.bench.points import append_point, latest, read_points
from dlp_deploy.bench.sweep import sweep
from dlp_deploy.errors import UserError

from .bench_reports import DENSE, SPARSE, point, report

STORED = report({DENSE: np.full((5, 8), 10.0), SPARSE: np.full((5, 8), 5.0)})
FIRST, SECOND = point(STORED, 0.7), point(STORED, 0.8)


def test_a_whole_last_line_is_a_point_without_its_newline_too(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_point(path, FIRST)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_points(path) == [FIRST]
    append_point(path, SECOND)
    assert read_points(path) == [FIRST, SECOND]


def test_half_a_line_is_dropped_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    append_point(path, FIRST)
    path.write_bytes(path.read_bytes() + SECOND.model_dump_json(by_alias=True).encode()[:-1])
    assert read_points(path) == [FIRST]
    append_point(path, SECOND)
    assert read_points(path) == [FIRST, SECOND]


@pytest.mark.parametrize("name", ["s.md", "s.csv", "s.json", "s.png", "s"])
def test_points_are_not_kept_where_a_report_goes(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"--output .*/{name}: give a name that ends in \.jsonl"):
        sweep("tinyllama-1.1b", engine="onnxruntime", output=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_points_of_other_settings_are_not_of_the_sweep() -> None:
    old, new = point(STORED, 0.7, context=96), point(STORED, 0.8, context=512)
    assert latest([old, new], {"context": 512}) == [new]


def test_a_point_with_a_run_that_ended_early_is_not_whole() -> None:
    ended = STORED.runs[0].model_copy(update={"reason": "round 3 of 5: it died", "blocks": 2})
    assert point(STORED).is_whole
    assert not point(STORED, measured=[ended]).is_whole
    assert not point(STORED.model_copy(update={"runs": (ended, STORED.runs[1])})).is_whole
