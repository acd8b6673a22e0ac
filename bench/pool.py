"""Loaded workers of a measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..progress import say
from .cgroups import available_memory
from .engines import has_room
from .outcome import Outcome, Workload
from .statistics import is_stable
from .worker import EngineWorker, WorkerError

WARM_UPS = 8
# A large model fills a deep cache anew for minutes each time; by then the processor is warm, whatever varies.
LONG_WARM_UP_S = 120.0


class Pool:
    """Loaded workers. Where memory does not hold all, those that load fastest make room for the next:
    DeepSparse, which compiles its models, takes six times as long for a 7B one as ONNX Runtime."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.holds_all = workload, True
        self._workers: dict[str, EngineWorker] = {}
        self._load_s: dict[str, float] = {}
        self._warm: set[str] = set()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._workers):
            self.drop(name)

    @contextmanager
    def worker(self, outcome: Outcome) -> Iterator[EngineWorker]:
        """The loaded worker of a run."""
        name = outcome.candidate.name
        if (worker := self._workers.get(name)) is None:
            self._make_room(outcome)
            worker = load(outcome, self.workload, self.workload.cached_tokens)
            self._workers[name], self._load_s[name] = worker, outcome.load_s
        try:
            yield worker
        except BaseException:
            self.drop(name)
            raise

    @contextmanager
    def passing(self, outcome: Outcome, context: int) -> Iterator[EngineWorker]:
        """A worker of a run that has room for `context` tokens, and ends with this."""
        self._make_room(outcome)
        with load(outcome, self.workload, context) as worker:
            yield worker

    def _make_room(self, outcome: Outcome) -> None:
        candidate = outcome.candidate
        # Judged by what loaded engines really take, which is far less than they took while loading.
        for name in sorted(self._workers, key=self._load_s.__getitem__):
            if has_room(candidate.engine, candidate.weight_bytes, available_memory()):
                return
            if self.holds_all:
                say("Memory does not hold all models at once: they are loaded in turn in every round")
            self.holds_all = False
            self.drop(name)
        if candidate.weight_bytes > (free := available_memory()):
            needed, there = candidate.weight_bytes / 1e9, free / 1e9
            raise WorkerError(f"memory does not hold its {needed:.1f} GB of weights: {there:.1f} GB are free")

    def drop(self, name: str) -> None:
        self._warm.discard(name)
        if worker := self._workers.pop(name, None):
            worker.close()

    def warm_up(self, outcome: Outcome, worker: EngineWorker) -> None:
        """Generate untimed until the time per token has settled, twice at least, and no longer than some
        minutes."""
        if outcome.candidate.name in self._warm:
            return
        medians: list[float] = []
        began = time.monotonic()
        while len(medians) < 2 or not self._warmed_up(medians, time.monotonic() - began):
            generation = worker.generate(self.workload.ids, self.workload.new_tokens)
            medians.append(float(np.median(generation.samples_ms)))
        outcome.warm_ups = max(outcome.warm_ups, len(medians))
        outcome.settled = outcome.settled and is_stable(medians)
        self._warm.add(outcome.candidate.name)

    def _warmed_up(self, medians: list[float], seconds: float) -> bool:
        return is_stable(medians) or len(medians) >= WARM_UPS or seconds >= LONG_WARM_UP_S


def load(outcome: Outcome, workload: Workload, context: int) -> EngineWorker:
    """A worker that has loaded the model of a run, with room for `context` tokens."""
    candidate = outcome.candidate
    worker = EngineWorker.spawn(candidate.engine, workload.cores, workload.time_limit_s)
    try:
        outcome.load_s = worker.load(candidate.model, context, workload.prompt_tokens, workload.filled_tokens)
    except BaseException:
        worker.close()
        raise
    outcome.versions = worker.versions
    return worker
