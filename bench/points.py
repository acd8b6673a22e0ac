"""The file of a sweep: one JSON line per finished point, appended as it is finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UserError
from .report import Report, Run

SCHEMA: Literal[1] = 1


class Point(BaseModel):
    """One sparsity in one precision, beside the dense baselines of the same rounds.

    `report` holds the whole model, measured or extrapolated; `measured` the runs with fewer blocks that
    were extrapolated. `settings` are what must agree for two points to be of one sweep.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(alias="schema")
    shape: str
    quant: str
    sparsity: float
    settings: dict[str, Any]
    measured: tuple[Run, ...]
    report: Report

    @property
    def sparse(self) -> Run:
        return next(run for run in self.report.runs if not run.dense)

    def run(self, name: str) -> Run | None:
        return next((run for run in self.report.runs if run.name == name), None)

    @property
    def is_whole(self) -> bool:
        """Whether every run of it was timed to the end."""
        runs = (*self.report.runs, *self.measured)
        return all(run.status == "ok" and not run.reason for run in runs)


def read_points(path: Path) -> list[Point]:
    """The finished points; a last line that a killed sweep left unfinished is not one of them.

    Raises UserError naming a line that is no point.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if _is_json(last):
        # An editor may have taken the newline off.
        lines.append(last)
    return [_point(path, number, line) for number, line in enumerate(lines, 1)]


def append_point(path: Path, point: Point) -> None:
    """Add a line, durably, in the place of one that is unfinished."""
    with path.open("a+b") as stream:
        stream.seek(0)
        stored = stream.read()
        end = stored.rfind(b"\n") + 1
        if _is_json(stored[end:]):
            stream.write(b"\n")
        else:
            stream.truncate(end)
        stream.write(point.model_dump_json(by_alias=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def latest(points: Iterable[Point], settings: dict[str, Any]) -> list[Point]:
    """The last point of each precision and sparsity that was measured with `settings`, in their order."""
    found = {(point.quant, point.sparsity): point for point in points if point.settings == settings}
    return [found[key] for key in sorted(found)]


def baselines(points: Iterable[Point]) -> list[str]:
    """The names of all dense models beside these points."""
    return list(dict.fromkeys(run.name for point in points for run in point.report.runs if run.dense))


def as_report(points: Sequence[Point]) -> Report:
    """The newest points of one sweep as one report: all sparse runs, and of each dense model, which every
    point has measured, the run of the middle."""
    points = latest(points, points[-1].settings)
    first = points[0].report
    dense = tuple(_middle_run(points, run.name) for run in first.runs if run.dense)
    update = {
        "artifact": f"{points[0].shape}, random weights",
        "runs": (*dense, *(point.sparse for point in points)),
        "comparisons": (),
    }
    return first.model_copy(update=update)


def _middle_run(points: Sequence[Point], name: str) -> Run:
    """Of the runs called `name` the one with the median time per token, or the first where none was timed."""
    runs = [point.report.run(name) for point in points]
    timed = {run.tpot_ms.p50: run for run in runs if run.tpot_ms}
    return timed[sorted(timed)[(len(timed) - 1) // 2]] if timed else runs[0]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _point(path: Path, number: int, line: bytes) -> Point:
    try:
        return Point.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: line {number} is no point of a sweep: {field or 'JSON'}: {first['msg']}; "
            "remove it, or give another --output"
        ) from None
