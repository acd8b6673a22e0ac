"""A model that is too large to be measured whole, from two runs with some of its decoder blocks.

Time per token = fixed part + blocks x time per block; bytes and operations likewise. Decoder blocks are
alike, and the embedding, the final norm and the head make the fixed part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from .report import Environment, LatencyMs, NoiseRecord, Roofline, Run
from .roofline import under_roofs
from .statistics import drift, latency

# How the note begins that says from what.
EXTRAPOLATED = "extrapolated from"


def extrapolate(small: Run, large: Run, name: str, blocks: int, environment: Environment) -> Run:
    """The run `name` of a model with `blocks` blocks, from runs of the same rounds with fewer.

    Each round that both finished gives one sample: its medians, carried on, and no less than the larger
    run's, where the smaller one was disturbed. So the interval of a speed-up is one over rounds, and
    percentiles are among rounds, not among tokens. Tokens per second are carried on from the means over all
    tokens, as those of a measured run; the time to the first token, of which a round has one, from the
    medians over these rounds.

    What is wrong with either of the two is wrong with it, and the reason names the one. No engine has run the
    whole model, so nothing is said of its output.
    """
    assert small.blocks is not None
    assert large.blocks is not None
    factor = (blocks - large.blocks) / (large.blocks - small.blocks)
    described = _described(small, large, name, factor)
    for run in (small, large):
        if run.status != "ok":
            return described.model_copy(update={"status": run.status, "reason": f"{run.name}: {run.reason}"})

    rounds = min(len(small.samples), len(large.samples))

    def carried_on(of: Callable[[Run], np.ndarray]) -> np.ndarray:
        fewer, more = of(small), of(large)
        # Further blocks take no less than no time, whatever disturbed the run with fewer.
        return np.maximum(more + factor * (more - fewer), more)

    if np.median(large.samples[:rounds]) <= np.median(small.samples[:rounds]):
        reason = f"{large.blocks} blocks took no longer than {small.blocks}: the machine is too noisy"
        return described.model_copy(update={"status": "failed", "reason": reason})
    times = carried_on(lambda run: np.median(run.samples[:rounds], axis=1))
    mean = float(carried_on(lambda run: np.array(np.mean(run.samples[:rounds]))))
    first = carried_on(lambda run: np.array([np.median(run.ttft_samples_ms[:rounds])]))
    tpot = latency(times)
    figures = {
        "ttft_ms": LatencyMs(**asdict(latency(first))),
        "tpot_ms": LatencyMs(**asdict(tpot)),
        "tokens_per_s": 1000 / mean,
        "drift": drift(times[:, None]),
        "samples_per_round": 1,
        "samples_ms": tuple(times.tolist()),
        "ttft_samples_ms": tuple(first.tolist()),
        "roofline": _roofline(small, large, factor, tpot.p50, environment),
    }
    return described.model_copy(update=figures | _circumstances(small, large, blocks))


def _circumstances(small: Run, large: Run, blocks: int) -> dict[str, object]:
    return {
        "reason": "; ".join(f"{run.name}: {run.reason}" for run in (small, large) if run.reason),
        "warm_ups": max(small.warm_ups, large.warm_ups),
        "settled": small.settled and large.settled,
        "same_tokens": small.same_tokens and large.same_tokens,
        "noise": _noise(small, large),
        "notes": (
            *large.notes,
            f"{EXTRAPOLATED} {small.blocks} and {large.blocks} of {blocks} decoder blocks",
        ),
    }


def origin(run: Run) -> str:
    """What a run was extrapolated from, as its notes say; "" for one that was made."""
    return next((note for note in run.notes if note.startswith(EXTRAPOLATED)), "")


def _described(small: Run, large: Run, name: str, factor: float) -> Run:
    """The run before any figure of it."""
    about = ("engine", "precision", "sparsity", "dense", "status")
    lengths = ("cores", "prompt_tokens", "new_tokens", "context", "filled_tokens", "block_size")
    return Run(
        name=name,
        **{field: getattr(large, field) for field in (*about, *lengths)},
        weight_bytes=round(large.weight_bytes + factor * (large.weight_bytes - small.weight_bytes)),
        extrapolated_from=(small.name, large.name),
    )


def _noise(small: Run, large: Run) -> NoiseRecord | None:
    """That of both, which had the same cores: each share weighs as much as the time that it is of."""
    records = [run.noise for run in (small, large) if run.noise]
    if not records:
        return None
    total = sum(record.core_s for record in records)
    if not total:
        return records[-1]
    shares = {
        share: sum(getattr(record, share) * record.core_s for record in records) / total
        for share in NoiseRecord.model_fields
        if share != "core_s"
    }
    return NoiseRecord(core_s=total, **shares)


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
