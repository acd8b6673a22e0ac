"""A model that is too large to be measured whole, from two runs with some of its decoder blocks.

Time per token = fixed part + blocks x time per block; bytes and operations likewise. Decoder blocks are
alike, and the embedding, the final norm and the head make the fixed part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from .report import Environment, LatencyMs, Roofline, Run
from .roofline import under_roofs
from .statistics import drift, latency


def extrapolate(small: Run, large: Run, name: str, blocks: int, environment: Environment) -> Run:
    """The run `name` of a model with `blocks` blocks, from runs of the same rounds with fewer.

    Each round gives one sample: its medians, carried on. So the interval of a speed-up is one over
    rounds, and percentiles are among rounds, not among tokens. Tokens per second are carried on from the
    means over all tokens, as those of a measured run; the time to the first token, of which a round has one,
    from the medians over all rounds.
    """
    failed = next((run for run in (small, large) if run.status != "ok"), None)
    if failed:
        return failed.model_copy(update={"name": name, "blocks": None})
    assert small.blocks is not None
    assert large.blocks is not None
    factor = (blocks - large.blocks) / (large.blocks - small.blocks)

    def carried_on(of: Callable[[Run], np.ndarray]) -> np.ndarray:
        fewer, more = of(small), of(large)
        return more + factor * (more - fewer)

    rounds = min(len(small.samples), len(large.samples))
    times = carried_on(lambda run: np.median(run.samples[:rounds], axis=1))
    mean = float(carried_on(lambda run: np.mean(run.samples[:rounds])))
    first = carried_on(lambda run: np.array([np.median(run.ttft_samples_ms)]))
    weight_bytes = round(large.weight_bytes + factor * (large.weight_bytes - small.weight_bytes))
    run = large.model_copy(
        update={
            "name": name,
            "blocks": None,
            "extrapolated_from": (small.name, large.name),
            "weight_bytes": weight_bytes,
            "load_s": None,
            "peak_rss_bytes": None,
        }
    )
    if min(times.min(), mean, first.min()) <= 0:
        reason = f"{large.blocks} blocks took no longer than {small.blocks}: the machine is too noisy"
        return _unmeasured(run, reason)
    return run.model_copy(update=_measured(small, large, times, mean, first, factor, environment))


def _unmeasured(run: Run, reason: str) -> Run:
    about = ("name", "engine", "precision", "sparsity", "dense", "cores", "weight_bytes")
    lengths = ("prompt_tokens", "new_tokens", "context", "extrapolated_from")
    kept = {name: getattr(run, name) for name in (*about, *lengths)}
    return Run(**kept, status="failed", reason=reason)


def _measured(
    small: Run,
    large: Run,
    times: np.ndarray,
    mean: float,
    first: np.ndarray,
    factor: float,
    environment: Environment,
) -> dict[str, object]:
    tpot = latency(times)
    return {
        "ttft_ms": LatencyMs(**asdict(latency(first))),
        "tpot_ms": LatencyMs(**asdict(tpot)),
        "tokens_per_s": 1000 / mean,
        "drift": drift(times[:, None]),
        "samples_per_round": 1,
        "samples_ms": tuple(times.tolist()),
        "ttft_samples_ms": tuple(first.tolist()),
        "roofline": _roofline(small, large, factor, tpot.p50, environment),
        "notes": (
            *large.notes,
            f"extrapolated from {small.blocks} and {large.blocks} decoder blocks",
        ),
    }


def _roofline(
    small: Run, large: Run, factor: float, tpot_ms: float, environment: Environment
) -> Roofline | None:
    fewer, more = small.roofline, large.roofline
    if fewer is None or more is None:
        return None
    weight_bytes, kv_bytes, operations = (
        getattr(more, part) + factor * (getattr(more, part) - getattr(fewer, part))
        for part in ("weight_bytes", "kv_bytes", "operations")
    )
    return under_roofs(
        weight_bytes, kv_bytes, operations, more.estimated, large.precision, tpot_ms, environment
    )
