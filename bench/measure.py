"""The measurement: check every output, warm up, and time all runs in turn, round after round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..export.reference import read_reference
from ..perplexity import Perplexity, perplexity_of
from ..progress import Advance, progress, say
from .agreement import Agreement, compare, compare_at_depth, disagreement, first_positions
from .noise import Noise, Watch
from .outcome import Outcome, Workload, live
from .plan import Candidate
from .pool import Pool
from .worker import EngineWorker, WorkerError


def measure(outcomes: list[Outcome], workload: Workload) -> bool:
    """Measure all runs, whose outcomes grow meanwhile; whether all were loaded at once.

    A run whose output is wrong is not timed, and one whose worker fails ends alone, with the rounds that it
    has finished.
    """
    with Pool(workload) as pool:
        _check_outputs(pool, outcomes)
        _check_depth(pool, outcomes)
        _time_rounds(pool, outcomes)
        return pool.holds_all


def total_noise(outcomes: Sequence[Outcome]) -> Noise:
    return sum((outcome.noise for outcome in outcomes), Noise())


def measure_perplexity(outcomes: list[Outcome], windows: np.ndarray, workload: Workload) -> None:
    """Perplexity of each timed run in its engine, on windows int64 [n, L].

    Workers of their own take it, so that the memory of a run is that of decoding alone; where one fails,
    the latencies are kept.
    """
    timed = live(outcomes)
    with progress("Perplexity", len(timed) * len(windows)) as advance:
        for outcome in timed:
            try:
                outcome.perplexity = _perplexity(outcome.candidate, windows, workload, advance)
                if not np.isfinite(outcome.perplexity.perplexity):
                    outcome.notes.append("its perplexity is no finite number")
            except WorkerError as error:
                outcome.notes.append(f"no perplexity: {error}")
                say(f"{outcome.candidate.name} has no perplexity: {error}")


def _perplexity(
    candidate: Candidate, windows: np.ndarray, workload: Workload, advance: Advance
) -> Perplexity:
    rows = []
    with EngineWorker.spawn(candidate.engine, workload.cores, workload.time_limit_s) as worker:
        worker.load(candidate.model, context=windows.shape[1], prompt=0)
        for window in windows:
            rows.append(worker.window_nll(window[None]))
            advance(note=candidate.name)
    return perplexity_of(np.concatenate(rows))


@contextmanager
def _failing(outcome: Outcome, doing: str = "") -> Iterator[None]:
    """A worker's failure ends its own run and no other. `doing` is said before the failure."""
    try:
        yield
    except WorkerError as error:
        outcome.fail(f"{doing}{error}")
        say(f"{outcome.candidate.name} failed: {error}")


def _reject(pool: Pool, outcome: Outcome, reason: str) -> None:
    outcome.reject(reason)
    say(f"{outcome.candidate.name}: wrong output, not timed: {reason}")
    pool.drop(outcome.candidate.name)


def _check_outputs(pool: Pool, outcomes: Sequence[Outcome]) -> None:
    with progress("Loading and checking outputs", len(outcomes)) as advance:
        for outcome in outcomes:
            with _failing(outcome):
                outcome.agreement = _agreement(pool, outcome)
                if outcome.agreement.holds:
                    _follow(pool, outcome)
                else:
                    _reject(pool, outcome, disagreement(outcome.agreement))
            advance(note=outcome.candidate.name)


def _agreement(pool: Pool, outcome: Outcome) -> Agreement:
    whole = read_reference(outcome.candidate.reference)
    reference = first_positions(whole, pool.workload.cached_tokens)
    if reference is not None:
        with pool.worker(outcome) as worker:
            logits = worker.logits(reference.ids, reference.prompt)
        return compare(outcome.candidate, logits, reference)
    # The context to be measured is shorter than the reference's prompt: a larger cache, once, and what is
    # timed is checked at its depth only.
    with pool.passing(outcome, len(whole.ids)) as worker:
        logits = worker.logits(whole.ids, whole.prompt)
    return compare(outcome.candidate, logits, whole)


def _follow(pool: Pool, outcome: Outcome) -> None:
    with pool.worker(outcome) as worker:
        outcome.at_depth = worker.follow(pool.workload.ids, pool.workload.following)
    if not np.isfinite(outcome.at_depth).all():
        _reject(pool, outcome, "its logits at the timed depth are not all finite numbers")


def _check_depth(pool: Pool, outcomes: Sequence[Outcome]) -> None:
    """Hold all runs of a model at the timed depth against torch, or else against one of them in fp32."""
    for outcome in outcomes:
        found = _expected_at_depth(outcome, outcomes, pool.workload)
        if outcome.ended or found is None:
            continue
        expected, reference = found
        assert outcome.agreement is not None
        assert outcome.at_depth is not None
        outcome.depth = compare_at_depth(
            outcome.candidate, outcome.agreement, outcome.at_depth, expected, reference
        )
        if not outcome.depth.holds:
            _reject(pool, outcome, disagreement(outcome.depth))
    for outcome in outcomes:
        outcome.at_depth = None


def _expected_at_depth(
    outcome: Outcome, outcomes: Sequence[Outcome], workload: Workload
) -> tuple[np.ndarray, str] | None:
    candidate = outcome.candidate
    if candidate.weights in workload.torch_at_depth:
        return workload.torch_at_depth[candidate.weights], "torch"
    for other in outcomes:
        same = other.candidate.weights == candidate.weights and other is not outcome
        if same and other.candidate.precision == "fp32" and other.at_depth is not None and not other.ended:
            return other.at_depth, other.candidate.name
    return None


def _time_rounds(pool: Pool, outcomes: list[Outcome]) -> None:
    """Rounds C B A, A B C, ...: what drifts slowly then meets all runs alike.

    A round begins with the runs that were last in the one before, or in the check, if they are loaded.
    """
    repeats, watch = pool.workload.repeats, Watch(pool.workload.cores)
    if pool.holds_all:
        with progress("Warming up", len(live(outcomes))) as advance:
            for outcome in live(outcomes):
                with _failing(outcome), pool.worker(outcome) as worker:
                    pool.warm_up(outcome, worker)
                advance(note=outcome.candidate.name)
    with progress("Measuring", len(live(outcomes)) * repeats) as advance:
        for index in range(repeats):
            for outcome in live(outcomes)[:: 1 if index % 2 else -1]:
                doing = f"round {index + 1} of {repeats}: "
                with _failing(outcome, doing), pool.worker(outcome) as worker:
                    pool.warm_up(outcome, worker)
                    _time_one(pool, worker, outcome, watch)
                advance(note=outcome.candidate.name)


def _time_one(pool: Pool, worker: EngineWorker, outcome: Outcome, watch: Watch) -> None:
    with watch(lambda: worker.memory().cpu_s) as noise:
        generation = worker.generate(pool.workload.ids, pool.workload.new_tokens)
    peak = worker.memory().peak_rss_bytes
    if not generation.finite:
        _reject(pool, outcome, "its logits are not all finite numbers while it is timed")
        return
    outcome.noise += noise
    outcome.generations.append(generation)
    outcome.peak_rss_bytes = max(outcome.peak_rss_bytes, peak)
