"""From outcomes to a report: latencies, comparisons, the environment block, and what to warn of."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..families import Outline
from .agreement import Agreement, DepthCheck
from .bandwidth import measure_bandwidth
from .cgroups import available_memory
from .cores import nodes_of, nodes_with_memory
from .machine import cache_bytes, describe_machine
from .outcome import Outcome, Workload
from .peak import Peak, measure_peak
from .report import (
    Comparison,
    DepthAgreement,
    EngineRecord,
    Environment,
    LatencyMs,
    OutputAgreement,
    Run,
)
from .roofline import roofline, traffic_of
from .statistics import alike, drift, latency, speedup
from .worker import WorkerError


@dataclass(frozen=True)
class Roofs:
    """Bytes a second that `cores` read from memory, and operations a second that they do."""

    cores: tuple[int, ...]
    bandwidth: float
    peak: Peak


def measure_roofs(cores: Sequence[int]) -> Roofs:
    """Raises WorkerError where they cannot be measured."""
    return Roofs(tuple(cores), _bandwidth(cores), measure_peak(cores))


def _bandwidth(cores: Sequence[int]) -> float:
    return measure_bandwidth(cores, cache_bytes(cores), available_memory())


def describe_environment(before: Roofs, outcomes: Sequence[Outcome], again: bool = True) -> Environment:
    """The machine, its memory bandwidth and peak rates, and the versions of all that took part.

    The bandwidth is measured once more if `again`: the larger of both is reported, and their difference.
    """
    rates = [before.bandwidth]
    if again:
        # By now there is too much to lose for one more figure.
        with suppress(OSError, WorkerError):
            rates.append(_bandwidth(before.cores))
    return Environment(
        **asdict(describe_machine()),
        cores_used=before.cores,
        cache_bytes=cache_bytes(before.cores),
        nodes_used=nodes_of(before.cores),
        nodes_with_memory=nodes_with_memory(),
        memory_bandwidth_gbps=round(max(rates) / 1e9, 2),
        memory_bandwidth_spread=round(1 - min(rates) / max(rates), 4) if len(rates) > 1 else None,
        peak_fp32_gops=round(before.peak.fp32 / 1e9, 1),
        peak_int8_gops=round(before.peak.int8 / 1e9, 1),
        versions={"python": platform.python_version(), "dlp-deploy": version("dlp-deploy")},
        engines=_engine_records(outcomes),
        git_revision=git_revision(),
    )


def _engine_records(outcomes: Sequence[Outcome]) -> dict[str, EngineRecord]:
    """What each engine is, by name; its versions are those that any run of it has told."""
    engines = {outcome.candidate.engine.name: outcome.candidate.engine for outcome in outcomes}
    told = {outcome.candidate.engine.name: outcome.versions for outcome in outcomes if outcome.versions}
    return {
        name: EngineRecord(
            title=engine.title, licence=engine.licence, versions=told.get(name, {}), notes=engine.notes
        )
        for name, engine in engines.items()
    }


def git_revision() -> str | None:
    """The commit of the checkout that this runs from, marked when it has changes; None outside of one."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def run_record(outcome: Outcome, workload: Workload, decoder: Outline, environment: Environment) -> Run:
    """All that is known of one run; with latencies, and its place under the roofs, if it was timed."""
    candidate = outcome.candidate
    run = Run(
        name=candidate.name,
        engine=candidate.engine.name,
        precision=candidate.precision,
        sparsity=candidate.sparsity,
        dense=candidate.dense,
        status=outcome.status,
        reason=outcome.reason,
        cores=len(workload.cores),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        context=workload.context,
        filled_tokens=workload.filled_tokens,
        weight_bytes=candidate.weight_bytes,
        block_size=candidate.block_size,
        load_s=outcome.load_s or None,
        output_check=_agreement_record(outcome.agreement),
        depth_check=_depth_record(outcome.depth, workload),
        notes=(*candidate.notes, *outcome.notes),
    )
    if outcome.status != "ok":
        return run
    measured = _measured(outcome)
    traffic, median = traffic_of(outcome, decoder), float(np.median(outcome.samples_ms))
    roofs = roofline(traffic, workload, candidate.precision, median, environment)
    return run.model_copy(update=measured | {"roofline": roofs})


def _measured(outcome: Outcome) -> dict[str, object]:
    """The fields of a Run that only a timed one has."""
    samples = outcome.samples_ms
    first = np.array([generation.ttft_ms for generation in outcome.generations])
    tpot = latency(samples)
    quality = outcome.perplexity
    return {
        "ttft_ms": LatencyMs(**asdict(latency(first))),
        "tpot_ms": LatencyMs(**asdict(tpot)),
        "tokens_per_s": 1000 / tpot.mean,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "perplexity": _finite(quality.perplexity) if quality else None,
        "perplexity_stderr": _finite(quality.stderr) if quality else None,
        "warm_ups": outcome.warm_ups,
        "settled": outcome.settled,
        "tokens_sha256": outcome.tokens_sha256,
        "same_tokens": outcome.same_tokens,
        "noise": outcome.noise.record(),
        "drift": drift(samples),
        "samples_per_round": samples.shape[1],
        "samples_ms": tuple(samples.ravel().tolist()),
        "ttft_samples_ms": tuple(first.tolist()),
    }


def _agreement_record(agreement: Agreement | None) -> OutputAgreement | None:
    if agreement is None:
        return None
    torch, graph = agreement.torch, agreement.graph
    return OutputAgreement(
        max_rel_error=_finite(torch.max_rel_error),
        mean_rel_error=_finite(torch.mean_rel_error),
        greedy_match=torch.greedy_match,
        positions=torch.positions,
        limited=agreement.limited,
        limit=agreement.limit,
        graph_max_rel_error=_finite(graph.max_rel_error) if graph else None,
        graph_mean_rel_error=_finite(graph.mean_rel_error) if graph else None,
    )


def _depth_record(found: DepthCheck | None, workload: Workload) -> DepthAgreement | None:
    if found is None:
        return None
    return DepthAgreement(
        reference=found.reference,
        depth=len(workload.ids),
        positions=found.check.positions,
        max_rel_error=_finite(found.check.max_rel_error),
        mean_rel_error=_finite(found.check.mean_rel_error),
        greedy_match=found.check.greedy_match,
        limited=found.limited,
        limit=found.limit,
    )


def _finite(value: float) -> float | None:
    # JSON has no nan and no infinity.
    return value if math.isfinite(value) else None


def compare_runs(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """Every timed run against every timed dense one."""
    timed = [run for run in runs if run.tpot_ms]
    return tuple(_comparison(run, base) for run in timed for base in timed if base.dense and run is not base)


def _comparison(run: Run, baseline: Run) -> Comparison:
    ratio = speedup(*alike(baseline.samples, run.samples))
    first, base_first = (float(np.median(each.ttft_samples_ms)) for each in (run, baseline))
    return Comparison(
        run=run.name,
        baseline=baseline.name,
        speedup=ratio.value,
        ci95=ratio.interval,
        ttft_speedup=base_first / first,
    )
