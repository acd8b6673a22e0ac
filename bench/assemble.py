"""From outcomes to a report: latencies, comparisons, the environment block, and what to warn of."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..families import Outline
from .bandwidth import measure_bandwidth
from .machine import available_memory, describe_machine
from .measure import Agreement, Noise, Outcome, Workload
from .peak import measure_peak
from .report import (
    Comparison,
    EngineRecord,
    Environment,
    LatencyMs,
    NoiseRecord,
    OutputAgreement,
    Run,
)
from .roofline import roofline, traffic_of
from .statistics import DRIFT_LIMIT, alike, drift, latency, speedup

STOLEN_LIMIT = 0.01
OTHERS_LIMIT = 0.05
# Beyond this share of the measured bandwidth an extrapolated time is not to be believed.
BANDWIDTH_LIMIT = 1.1


def describe_environment(cores: Sequence[int], outcomes: Sequence[Outcome]) -> Environment:
    """The machine, its memory bandwidth and peak rates on `cores`, and the versions of all that took part."""
    machine = describe_machine()
    bandwidth = measure_bandwidth(cores, machine.caches.get("L3", 0), available_memory())
    peak = measure_peak(cores)
    return Environment(
        **asdict(machine),
        cores_used=tuple(cores),
        memory_bandwidth_gbps=round(bandwidth / 1e9, 2),
        peak_fp32_gops=round(peak.fp32 / 1e9, 1),
        peak_int8_gops=round(peak.int8 / 1e9, 1),
        versions={"python": platform.python_version(), "dlp-deploy": version("dlp-deploy")},
        engines={outcome.candidate.engine.name: _engine_record(outcome) for outcome in outcomes},
        git_revision=git_revision(),
    )


def _engine_record(outcome: Outcome) -> EngineRecord:
    engine = outcome.candidate.engine
    return EngineRecord(
        title=engine.title, licence=engine.licence, versions=outcome.versions, notes=engine.notes
    )


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
        weight_bytes=candidate.weight_bytes,
        load_s=outcome.load_s or None,
        output_check=_agreement_record(outcome.agreement),
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
        "perplexity": quality.perplexity if quality else None,
        "perplexity_stderr": _finite(quality.stderr) if quality else None,
        "warm_ups": outcome.warm_ups,
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
        speedup=ratio.median,
        ci95=(ratio.low, ratio.high),
        ttft_speedup=base_first / first,
    )


def noise_record(noise: Noise) -> NoiseRecord:
    # The difference of two coarse clocks may come out just below zero on a quiet machine.
    return NoiseRecord(stolen_share=noise.stolen_share, others_share=max(0.0, noise.others_share))


def warnings(runs: Sequence[Run], noise: NoiseRecord) -> tuple[str, ...]:
    """What a reader must know before believing the figures."""
    found = []
    if noise.stolen_share > STOLEN_LIMIT:
        found.append(
            f"the hypervisor took {noise.stolen_share:.1%} of the cores' time: figures are pessimistic"
        )
    if noise.others_share > OTHERS_LIMIT:
        found.append(
            f"other processes used {noise.others_share:.0%} of the cores' time: repeat on a quiet machine"
        )
    for run in runs:
        if run.drift is not None and run.drift > DRIFT_LIMIT:
            found.append(
                f"{run.name} varied by {run.drift:.0%} from round to round: conditions were not steady"
            )
        if run.extrapolated_from and run.roofline and run.roofline.bandwidth_share > BANDWIDTH_LIMIT:
            found.append(
                f"{run.name}, which is extrapolated, would read memory at {run.roofline.bandwidth_share:.0%} "
                "of the measured bandwidth: its time is too short, and speed-ups over it are too small"
            )
        if run.status != "ok":
            found.append(f"{run.name} is not timed ({run.status}): {run.reason}")
    if not any(run.dense and run.tpot_ms for run in runs):
        found.append("no dense baseline was timed, so there is no speed-up to report")
    return tuple(found)
