"""The measurement: check every output, warm up, and time all runs in turn, round after round."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..artifact import OutputCheck
from ..errors import UserError
from ..export.reference import Reference, read_reference
from ..export.verify import compare_logits
from ..perplexity import Perplexity, perplexity_of
from ..progress import Advance, progress, say
from .engines import has_room
from .machine import available_memory, processor_time
from .plan import Candidate
from .statistics import is_stable
from .worker import EngineWorker, Generation, Usage, WorkerError

Status = Literal["ok", "wrong output", "failed"]

# Float32 graphs differ from torch by the order of sums: 1e-6 to 1e-5 of the largest logit in all
# engines. A thousandth means that the engine computes something else.
FP32_LIMIT = 1e-3
# Rounding of activations amplifies the last bit of whatever came before, so two right engines differ
# on the same quantized graph almost as much as each does from torch (SmolLM2-135M, int8: mean error
# 1.3e-2 between DeepSparse and ONNX Runtime; 1.5e-2 and 1.6e-2 to torch). So an engine is held to the
# mean error of ONNX Runtime on that graph; one that computes something else is tens of times beyond.
QUANTIZED_RATIO = 1.5
# Without that measure there is only what a right graph has never reached.
UNMEASURED_LIMIT = 0.1
WARM_UPS = 8


@dataclass(frozen=True)
class Workload:
    """What every run does. `ids` int64: tokens that fill the cache, then the prompt of `prompt_tokens`."""

    cores: tuple[int, ...]
    ids: np.ndarray
    prompt_tokens: int
    new_tokens: int
    context: int
    repeats: int

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache holds in the end: the last token generated is never fed."""
        return self.context - 1


def check_lengths(prompt_tokens: int, new_tokens: int, repeats: int, context: int, positions: int) -> None:
    """Raise UserError for lengths that cannot be timed, or that a model of `positions` does not hold."""
    if prompt_tokens < 1:
        raise UserError(f"--prompt-tokens {prompt_tokens}: at least 1 is needed")
    if new_tokens < 2:
        raise UserError(f"--new-tokens {new_tokens}: at least 2 are needed to time one after the first")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: at least 1 is needed")
    if context < prompt_tokens + new_tokens:
        needed = prompt_tokens + new_tokens
        raise UserError(f"--context {context} is too short for prompt and new tokens; use {needed} or more")
    if context > positions:
        raise UserError(f"a context of {context} is longer than the {positions} positions of the model")


@dataclass(frozen=True)
class Agreement:
    """An engine's logits held against torch in fp32, and against ONNX Runtime on the same graph if known.

    `limited` names the figure of `torch` that must not exceed `limit`.
    """

    torch: OutputCheck
    graph: OutputCheck | None
    limited: Literal["max_rel_error", "mean_rel_error"]
    limit: float

    @property
    def error(self) -> float:
        return self.torch.max_rel_error if self.limited == "max_rel_error" else self.torch.mean_rel_error

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


@dataclass
class Outcome:
    """What is known of one run; grows while it is measured."""

    candidate: Candidate
    status: Status = "ok"
    reason: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float = 0.0
    agreement: Agreement | None = None
    warm_ups: int = 0
    generations: list[Generation] = field(default_factory=list)
    peak_rss_bytes: int = 0
    perplexity: Perplexity | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def samples_ms(self) -> np.ndarray:
        """Time of each token after the first, float64 [rounds, new_tokens - 1]."""
        return np.array([generation.samples_ms for generation in self.generations])


@dataclass
class Noise:
    """Time of the used cores during all timed generation, and what of it was not the run's own."""

    core_s: float = 0.0
    stolen_s: float = 0.0
    others_s: float = 0.0

    @property
    def stolen_share(self) -> float:
        return self.stolen_s / self.core_s if self.core_s else 0.0

    @property
    def others_share(self) -> float:
        return self.others_s / self.core_s if self.core_s else 0.0


def measure(candidates: Sequence[Candidate], workload: Workload) -> tuple[list[Outcome], Noise, bool]:
    """Measure all candidates; the outcomes in their order, the noise, and whether all were loaded at once.

    A run whose output is wrong is not timed, and one whose worker fails ends alone.
    """
    outcomes = [Outcome(candidate) for candidate in candidates]
    noise = Noise()
    with _Pool(workload) as pool:
        _check_outputs(pool, outcomes)
        _time_rounds(pool, outcomes, noise)
    return outcomes, noise, pool.holds_all


def measure_perplexity(outcomes: Sequence[Outcome], windows: np.ndarray, cores: Sequence[int]) -> None:
    """Perplexity of each timed run in its engine, on windows int64 [n, L].

    Workers of their own take it, so that the memory of a run is that of decoding alone; where one fails,
    the latencies are kept.
    """
    live = _live(outcomes)
    with progress("Perplexity", len(live) * len(windows)) as advance:
        for outcome in live:
            try:
                outcome.perplexity = _perplexity(outcome.candidate, windows, cores, advance)
            except WorkerError as error:
                outcome.notes.append(f"no perplexity: {error}")
                say(f"{outcome.candidate.name} has no perplexity: {error}")


def _perplexity(
    candidate: Candidate, windows: np.ndarray, cores: Sequence[int], advance: Advance
) -> Perplexity:
    rows = []
    with EngineWorker.spawn(candidate.engine, cores) as worker:
        worker.load(candidate.model, context=windows.shape[1], prompt=0)
        for window in windows:
            rows.append(worker.window_nll(window[None]))
            advance(note=candidate.name)
    return perplexity_of(np.concatenate(rows))


class _Pool:
    """Loaded workers. Where memory does not hold all, those not used for longest make room for the next."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.holds_all = workload, True
        # The least recently used comes first.
        self._workers: dict[str, EngineWorker] = {}
        self._warm: set[str] = set()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._workers):
            self.drop(name)

    @contextmanager
    def worker(self, outcome: Outcome) -> Iterator[EngineWorker]:
        """The loaded worker of a run."""
        name = outcome.candidate.name
        if (worker := self._workers.pop(name, None)) is None:
            self._make_room(outcome.candidate)
            worker = _load(outcome, self.workload, self.workload.cached_tokens)
        self._workers[name] = worker
        try:
            yield worker
        except BaseException:
            self.drop(name)
            raise

    def _make_room(self, candidate: Candidate) -> None:
        # Judged by what loaded engines really take, which is far less than they took while loading.
        for name in list(self._workers):
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
        """Generate untimed until the time per token has settled."""
        if outcome.candidate.name in self._warm:
            return
        medians: list[float] = []
        while not is_stable(medians) and len(medians) < WARM_UPS:
            generation = worker.generate(self.workload.ids, self.workload.new_tokens)
            medians.append(float(np.median(generation.samples_ms)))
        outcome.warm_ups = max(outcome.warm_ups, len(medians))
        self._warm.add(outcome.candidate.name)


def _load(outcome: Outcome, workload: Workload, context: int) -> EngineWorker:
    candidate = outcome.candidate
    worker = EngineWorker.spawn(candidate.engine, workload.cores)
    try:
        outcome.load_s = worker.load(candidate.model, context, workload.prompt_tokens)
    except BaseException:
        worker.close()
        raise
    outcome.versions = worker.versions
    return worker


def _live(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.status == "ok"]


@contextmanager
def _failing(outcome: Outcome) -> Iterator[None]:
    """A worker's failure ends its own run and no other."""
    try:
        yield
    except WorkerError as error:
        outcome.status, outcome.reason = "failed", str(error)
        say(f"{outcome.candidate.name} failed: {error}")


def _check_outputs(pool: _Pool, outcomes: Sequence[Outcome]) -> None:
    with progress("Loading and checking outputs", len(outcomes)) as advance:
        for outcome in outcomes:
            with _failing(outcome):
                outcome.agreement = _agreement(pool, outcome)
                if not outcome.agreement.holds:
                    outcome.status, outcome.reason = "wrong output", _disagreement(outcome.agreement)
                    say(f"{outcome.candidate.name}: wrong output, not timed: {outcome.reason}")
                    pool.drop(outcome.candidate.name)
            advance(note=outcome.candidate.name)


def _agreement(pool: _Pool, outcome: Outcome) -> Agreement:
    reference = read_reference(outcome.candidate.reference)
    if len(reference.ids) <= pool.workload.cached_tokens:
        with pool.worker(outcome) as worker:
            logits = worker.logits(reference.ids, reference.prompt)
    else:
        # The context to be measured is shorter than the reference text.
        with _load(outcome, pool.workload, len(reference.ids)) as worker:
            logits = worker.logits(reference.ids, reference.prompt)
    return compare(outcome.candidate, logits, reference)


def compare(candidate: Candidate, logits: np.ndarray, reference: Reference) -> Agreement:
    """Hold float32 logits [positions, vocabulary] against torch, as closely as the precision allows."""
    engine = candidate.engine.name
    torch = compare_logits(engine, "torch", logits, reference.logits)
    if candidate.precision == "fp32":
        return Agreement(torch, None, "max_rel_error", FP32_LIMIT)
    if reference.graph_logits is None:
        return Agreement(torch, None, "mean_rel_error", UNMEASURED_LIMIT)
    graph = compare_logits(engine, "onnxruntime", logits, reference.graph_logits)
    quantization = compare_logits("onnxruntime", "torch", reference.graph_logits, reference.logits)
    return Agreement(torch, graph, "mean_rel_error", QUANTIZED_RATIO * quantization.mean_rel_error)


def _disagreement(agreement: Agreement) -> str:
    check, which = agreement.torch, agreement.limited.split("_")[0]
    return (
        f"the {which} error of its logits against torch is {agreement.error:.1e} of the largest "
        f"(limit {agreement.limit:.1e}); same arg max at {check.greedy_match:.0%} of {check.positions}"
    )


def _time_rounds(pool: _Pool, outcomes: Sequence[Outcome], noise: Noise) -> None:
    """Rounds C B A, A B C, ...: what drifts slowly then meets all runs alike.

    A round begins with the runs that were last in the one before, or in the check: these are still loaded.
    """
    live = _live(outcomes)
    if pool.holds_all:
        with progress("Warming up", len(live)) as advance:
            for outcome in live:
                with _failing(outcome), pool.worker(outcome) as worker:
                    pool.warm_up(outcome, worker)
                advance(note=outcome.candidate.name)
    with progress("Measuring", len(live) * pool.workload.repeats) as advance:
        for index in range(pool.workload.repeats):
            for outcome in _live(live)[:: 1 if index % 2 else -1]:
                with _failing(outcome), pool.worker(outcome) as worker:
                    pool.warm_up(outcome, worker)
                    _time_one(worker, outcome, pool.workload, noise)
                advance(note=outcome.candidate.name)


def _time_one(worker: EngineWorker, outcome: Outcome, workload: Workload, noise: Noise) -> None:
    usage, before, start = worker.memory(), processor_time(workload.cores), time.perf_counter()
    generation = worker.generate(workload.ids, workload.new_tokens)
    elapsed, after, used = time.perf_counter() - start, processor_time(workload.cores), worker.memory()
    _add_noise(noise, elapsed * len(workload.cores), before, after, usage, used)
    outcome.generations.append(generation)
    outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, used.peak_rss_bytes)


def _add_noise(
    noise: Noise, core_s: float, before: dict[str, float], after: dict[str, float], usage: Usage, used: Usage
) -> None:
    noise.core_s += core_s
    noise.stolen_s += after["stolen"] - before["stolen"]
    others = (after["busy"] - before["busy"]) - (used.cpu_s - usage.cpu_s)
    # Both are counted in ticks of 10 ms, so the difference of a quiet machine scatters around zero.
    noise.others_s += others
