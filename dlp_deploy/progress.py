"""Progress on long work: bars on a terminal, nothing but the plain milestones elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Progress goes to stderr so that stdout carries only results and can be piped.
console = Console(stderr=True, highlight=False)


class Advance(Protocol):
    """Reports finished steps; `note` says what the current one is."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show a bar with step count, elapsed and remaining time while the body runs.

    Off a terminal the bar is not drawn: logs stay readable.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bars.update(task, advance=steps, note=note)

        yield advance


def say(message: str) -> None:
    """Print one milestone line on stderr, on a terminal and in a log alike."""
    console.print(message, markup=False, soft_wrap=True)
