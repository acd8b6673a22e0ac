"""What long work says of itself."""

from __future__ import annotations

import io
import itertools
import time

import pytest
from rich.console import Console

from dlp_deploy import progress as reporting
from dlp_deploy.progress import progress


def _run(console: Console, monkeypatch: pytest.MonkeyPatch, seconds_per_step: float) -> str:
    """What is said during four steps that take so long each."""
    clock = itertools.count(step=seconds_per_step)
    monkeypatch.setattr(reporting, "console", console)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress("Smoothing", 4) as advance:
        for index in range(4):
            advance(note=f"block {index}")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _run(Console(file=io.StringIO()), monkeypatch, 40)
    # 40 s is too early, 80 s is not, and at 120 s the last line is but 40 s old.
    assert said.splitlines() == [
        "Smoothing: 2 of 4, 0:01:20 elapsed, about 0:01:20 left, block 1",
    ]
    said = _run(Console(file=io.StringIO()), monkeypatch, 90)
    assert [line.split(",")[0] for line in said.splitlines()] == [
        f"Smoothing: {step} of 4" for step in (1, 2, 3)
    ]


def test_a_log_hears_nothing_of_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(Console(file=io.StringIO()), monkeypatch, 10) == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert "Smoothing" in _run(terminal, monkeypatch, 0.01)
