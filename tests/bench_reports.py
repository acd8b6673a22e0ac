"""Reports with chosen samples, for what is computed from reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dlp_deploy.bench.assemble import compare_runs
from dlp_deploy.bench.points import Point
from dlp_deploy.bench.report import Environment, LatencyMs, NoiseRecord, Report, Run
from dlp_deploy.bench.roofline import under_roofs
from dlp_deploy.bench.statistics import latency

DENSE, SPARSE = "onnxruntime-fp32-dense", "deepsparse-int8-s70"


def environment(cores: int = 1, **changes: Any) -> Environment:
    facts: dict[str, Any] = {
        "cpu": "Xeon",
        "architecture": "x86_64",
        "isa": ("avx2",),
        "sockets": 1,
        "numa_nodes": 1,
        "physical_cores": 4,
        "logical_cores": 4,
        "usable_cores": 4,
        "cpu_quota": None,
        "cores_used": tuple(range(cores)),
        "caches": {"L3": 1 << 25},
        "governor": None,
        "clock_ghz": 2.0,
        "hypervisor": False,
        "memory_bytes": 1 << 35,
        "memory_bandwidth_gbps": 10.0 * cores,
        "peak_fp32_gops": 100.0 * cores,
        "peak_int8_gops": 400.0 * cores,
        "kernel": "6",
        "operating_system": "Linux",
        "versions": {"dlp-deploy": "0.1.0"},
        "engines": {},
        "git_revision": None,
    }
    return Environment(**facts | changes)


def report(samples: Mapping[str, np.ndarray], gigabytes: float = 0.1, **changes: Any) -> Report:
    """A report of runs with these times in milliseconds, [rounds, samples] each, by their names; every
    token moves `gigabytes`. `changes` are of the environment."""
    facts = environment(**changes)
    runs = tuple(_run(name, times, gigabytes, facts) for name, times in samples.items())
    return Report(
        schema=1,
        created="2026-01-01T00:00:00+00:00",
        dlp_deploy="0.1.0",
        artifact="tiny-s70",
        model="tiny",
        command={"cores": len(facts.cores_used)},
        environment=facts,
        evaluation=None,
        all_loaded=True,
        runs=runs,
        comparisons=compare_runs(runs),
        noise=NoiseRecord(stolen_share=0, others_share=0),
        warnings=(),
    )


def _run(name: str, times: np.ndarray, gigabytes: float, facts: Environment) -> Run:
    engine, precision, kind = name.split("-")
    summary = LatencyMs(**asdict(latency(times)))
    return Run(
        name=name,
        engine=engine,
        precision=precision,
        sparsity=0.0 if kind == "dense" else 0.7,
        dense=kind == "dense",
        status="ok",
        cores=len(facts.cores_used),
        prompt_tokens=256,
        new_tokens=times.shape[1] + 1,
        context=512,
        weight_bytes=round(gigabytes * 1e9),
        ttft_ms=summary,
        tpot_ms=summary,
        tokens_per_s=1000 / summary.mean,
        samples_per_round=times.shape[1],
        samples_ms=tuple(times.ravel().tolist()),
        ttft_samples_ms=tuple(times[:, 0].tolist()),
        roofline=under_roofs(gigabytes * 1e9, 0, 1e8, False, precision, summary.p50, facts),
    )


def point(stored: Report, sparsity: float = 0.7, measured: Sequence[Run] = (), **settings: Any) -> Point:
    """The point of a sweep that `stored` is the report of."""
    return Point(
        schema=1,
        shape="tiny",
        quant="int8",
        sparsity=sparsity,
        settings=settings,
        measured=tuple(measured),
        report=stored,
    )
