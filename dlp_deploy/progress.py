"""Progress on long work: a bar on a terminal, and in a log a line a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
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
LOG_EVERY_S = 60.0


class Advance(Protocol):
    """Reports finished steps; `note` says what the current one is."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Show step count, elapsed and remaining time while the body runs.

    Off a terminal, where a bar would fill a log, a line says so every LOG_EVERY_S: what takes less is silent.
    """
    if not console.is_terminal:
        yield _logged(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(description, total=total, note="")

        def advance(steps: int = 1, note: str = "") -> None:
            bars.update(task, advance=steps, note=note)

        yield advance


def _logged(description: str, total: int) -> Advance:
    begun = said = time.monotonic()
    done = 0

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal said, done
        done += steps
        now = time.monotonic()
        if now - said < LOG_EVERY_S or not 0 < done < total:
            return
        said, elapsed = now, now - begun
        left = elapsed / done * (total - done)
        parts = [
            f"{description}: {done} of {total}",
            f"{_clock(elapsed)} elapsed",
            f"about {_clock(left)} left",
        ]
        say(", ".join([*parts, note] if note else parts))

    return advance


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def say(message: str) -> None:
    """Print one milestone line on stderr, on a terminal and in a log alike."""
    console.print(message, markup=False, soft_wrap=True)
