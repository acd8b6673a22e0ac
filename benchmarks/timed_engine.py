"""A worker for loop_overhead.py: the engine's own worker, which also notes how long the engine itself took.

TIMED_ENGINE names the worker, TIMED_FILE where the times go, as JSON, whenever the cache is emptied.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

_inner = importlib.import_module("engine_workers." + os.environ["TIMED_ENGINE"])
# The calls that do the work; all around them is ours.
_CALLS = ("run_with_iobinding", "execute_list_out", "llama_decode")


class _Timed:
    """Stands for an engine's object, and adds up what its calls take."""

    def __init__(self, target: Any, times: list[float]) -> None:
        self._target, self._times = target, times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if name == "_eng_net":
            return _Timed(found, self._times)
        return self._call(found) if name in _CALLS else found

    def _call(self, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter_ns()
            result = call(*arguments)
            self._times.append((time.perf_counter_ns() - start) / 1e6)
            return result

        return timed


class Session(_inner.Session):  # type: ignore[misc, name-defined]
    def __init__(self, threads: int) -> None:
        self._times: list[float] = []
        super().__init__(threads)

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        super().load(model, context, prompt, fill)
        for compiled in getattr(self._cache, "engines", []):
            compiled._engine = _Timed(compiled._engine, self._times)
        for name in ("_session", "_library"):
            if hasattr(self._cache, name):
                setattr(self._cache, name, _Timed(getattr(self._cache, name), self._times))

    def restart(self) -> None:
        Path(os.environ["TIMED_FILE"]).write_text(json.dumps(self._times), encoding="utf-8")
        self._times.clear()
        super().restart()
