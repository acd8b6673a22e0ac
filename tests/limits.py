"""Limits of the system and of workers, set for a while."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dlp_deploy.bench.worker import EngineWorker, Generation


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def short_limit(monkeypatch: pytest.MonkeyPatch, model: str, text: int, seconds: float) -> None:
    """Let the `text`-th generation of workers with `model` in the path of their model take `seconds`, and no
    more. All else has its time, however slow the machine is."""
    load, generate = EngineWorker.load, EngineWorker.generate
    models: dict[int, str] = {}
    texts: Counter[int] = Counter()

    def noted(self: EngineWorker, path: Path, *arguments: Any, **named: Any) -> float:
        models[self.pid] = str(path)
        return load(self, path, *arguments, **named)

    def limited(self: EngineWorker, *arguments: Any) -> Generation:
        texts[self.pid] += 1
        if model in models[self.pid] and texts[self.pid] == text:
            self.time_limit_s = seconds
        return generate(self, *arguments)

    monkeypatch.setattr(EngineWorker, "load", noted)
    monkeypatch.setattr(EngineWorker, "generate", limited)
