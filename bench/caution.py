"""What a reader of a report must know before believing its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..export.plan import BASELINE_BLOCK_SIZE
from .report import Environment, NoiseRecord, Run
from .statistics import DRIFT_LIMIT

STOLEN_LIMIT = 0.01
OTHERS_LIMIT = 0.05
BESIDE_LIMIT = 0.25
THROTTLED_LIMIT = 0.01
# Processor time is counted in ticks of 10 ms, so less than some of them is no evidence.
COUNTED_S = 0.1
# Beyond this share of the measured bandwidth an extrapolated time is not to be believed.
BANDWIDTH_LIMIT = 1.1
FEW_ROUNDS = 5
# The dense models without which the best dense one may be a slow one.
BEST_DENSE = ("int8", "int4")
# A cache of fewer tokens takes next to no time, and that is the part which sparse weights do not shorten.
SHALLOW = 256
# The memory's rate before and after the runs.
SPREAD_LIMIT = 0.1


def warnings(
    runs: Sequence[Run],
    noise: NoiseRecord,
    environment: Environment | None = None,
    measured: Sequence[Run] = (),
    all_loaded: bool = True,
) -> tuple[str, ...]:
    """One line for each reason to doubt; `noise` is that of all runs together, `measured` are the runs that
    some of `runs` were extrapolated from, and `all_loaded` says whether all models were in memory at once."""
    made = [run for run in (*runs, *measured) if not run.extrapolated_from]
    found = [*_disturbances(made, noise)]
    if environment:
        found += _conditions(environment)
    if not all_loaded:
        found.append(
            "memory did not hold all models at once, so that loading and warming up came between the two "
            "sides of a ratio: they are minutes apart, and what changes within minutes is in the ratio; "
            "measure fewer runs at a time"
        )
    # One of a pair that was not timed is named by the reason of what is extrapolated from the pair.
    for run in (*runs, *(run for run in measured if run.status == "ok")):
        found += _doubts(run)
    found += _few_rounds(runs)
    found += _shallow(runs)
    found += _missing_baselines(runs)
    found += _fine_blocks(runs)
    return tuple(found)


def _conditions(environment: Environment) -> Iterator[str]:
    if len(environment.nodes_used) > 1:
        nodes = " and ".join(map(str, environment.nodes_used))
        yield f"the cores are on NUMA nodes {nodes}: each reads the memory of the others slowly"
    if far := set(environment.nodes_used).difference(environment.nodes_with_memory or environment.nodes_used):
        nodes = " and ".join(map(str, sorted(far)))
        yield f"NUMA node {nodes} has no memory that could be used: its cores read that of others, slowly"
    if environment.governor == "powersave":
        yield (
            "the clock's governor is powersave: cores may run below their full clock, and not always alike; "
            "set it with: sudo cpupower frequency-set --governor performance"
        )
    if (environment.memory_bandwidth_spread or 0) > SPREAD_LIMIT:
        yield (
            f"the memory was read at rates {environment.memory_bandwidth_spread:.0%} apart before and after "
            "the runs: conditions were not steady, and shares of the memory's rate are as uncertain"
        )


def _disturbances(runs: Sequence[Run], noise: NoiseRecord) -> Iterator[str]:
    kinds = (
        (
            "stolen_share",
            STOLEN_LIMIT,
            "the hypervisor took {:.1%} of the time{}: figures are pessimistic",
        ),
        ("throttled_share", THROTTLED_LIMIT, "the cgroup's quota held threads back for {:.1%} of the time{}"),
        (
            "others_share",
            OTHERS_LIMIT,
            "other processes used {:.0%} of the time{}: repeat on a quiet machine",
        ),
        (
            "siblings_share",
            OTHERS_LIMIT,
            "the other hardware threads of these cores were busy for {:.0%} of the time{}, which slows both",
        ),
        (
            "beside_share",
            BESIDE_LIMIT,
            "the machine's other cores were {:.0%} busy{}: they may have used the same memory and caches",
        ),
    )
    for share, limit, text in kinds:
        hit = [run for run in runs if run.noise and _exceeds(run.noise, share, limit)]
        if hit or _exceeds(noise, share, limit):
            named = ", ".join(f"{run.name} {getattr(run.noise, share):.0%}" for run in hit)
            yield text.format(getattr(noise, share), f" ({named})" if named else "")
    for run in runs:
        if run.noise and _exceeds(run.noise, "others_share", OTHERS_LIMIT, -1):
            yield (
                f"{run.name} used {-run.noise.others_share:.0%} more processor time than its cores gave: "
                "some of its threads ran elsewhere"
            )


def _exceeds(noise: NoiseRecord, share: str, limit: float, sign: int = 1) -> bool:
    value = sign * float(getattr(noise, share))
    return value > limit and value * noise.core_s > COUNTED_S


def _doubts(run: Run) -> Iterator[str]:
    if run.status != "ok":
        yield f"{run.name} is not timed ({run.status}): {run.reason}"
    elif not run.extrapolated_from:
        yield from _doubts_of_measurement(run)
    if run.drift is not None and run.drift > DRIFT_LIMIT:
        yield f"{run.name} varied by {run.drift:.0%} from round to round: conditions were not steady"
    if run.extrapolated_from and run.roofline and run.roofline.bandwidth_share > BANDWIDTH_LIMIT:
        yield (
            f"{run.name}, which is extrapolated, would read memory at {run.roofline.bandwidth_share:.0%} "
            "of the measured bandwidth: its time is too short, and speed-ups over it are too small"
        )


def _doubts_of_measurement(run: Run) -> Iterator[str]:
    if run.reason:
        yield f"{run.name} ended early, and has only the rounds before: {run.reason}"
    if not run.settled:
        yield f"{run.name} had not settled after {run.warm_ups} warm-ups: its times may still change"
    if not run.same_tokens:
        yield f"{run.name} generated different tokens in different rounds of the same text"


def _few_rounds(runs: Sequence[Run]) -> Iterator[str]:
    rounds = [len(run.samples) for run in runs if run.tpot_ms]
    if not rounds or min(rounds) >= FEW_ROUNDS:
        return
    if min(rounds) == 1:
        yield "one round does not tell how sure a speed-up is: no interval is given; use --repeats 5 or more"
    else:
        yield (
            f"intervals of {min(rounds)} rounds are wide, and right only where the logarithms of the rounds' "
            "ratios are normally distributed; use --repeats 5 or more"
        )


def _shallow(runs: Sequence[Run]) -> Iterator[str]:
    depths = [((run.filled_tokens or 0) + run.prompt_tokens, run.new_tokens) for run in runs if run.tpot_ms]
    if depths and min(depths)[0] < SHALLOW:
        depth, new = min(depths)
        yield (
            f"decoding was timed behind {depth} to {depth + new - 2} cached tokens: attention to so few "
            "takes next to no time, which flatters sparse weights; give --context 512 or more"
        )


def _missing_baselines(runs: Sequence[Run]) -> Iterator[str]:
    dense = [run for run in runs if run.dense and run.tpot_ms]
    if not dense:
        yield "no dense baseline was timed, so there is no speed-up to report"
        return
    if not any(run.precision == "fp32" for run in dense):
        yield (
            "dense fp32 was not timed, so there is no speed-up over it, which is what papers state; "
            "add it with --baseline fp32,int8,int4"
        )
    timed = {run.precision for run in dense if run.engine == "onnxruntime"}
    if missing := [precision for precision in BEST_DENSE if precision not in timed]:
        yield (
            f"dense {' and '.join(missing)} in ONNX Runtime was not timed: the best dense run is only the "
            "best of those that were"
        )


def _fine_blocks(runs: Sequence[Run]) -> Iterator[str]:
    """Dense baselines that a finer grid than the fastest has slowed down."""
    dense = [run for run in runs if run.dense and run.engine == "onnxruntime"]
    slow = [run for run in dense if (run.block_size or BASELINE_BLOCK_SIZE) < BASELINE_BLOCK_SIZE]
    if slow:
        named = ", ".join(f"{run.name} {run.block_size}" for run in slow)
        precisions = ",".join(run.precision for run in slow)
        yield (
            f"so few weights of a dense baseline share a scale ({named}) that it is slower than with "
            f"{BASELINE_BLOCK_SIZE}, and speed-ups over it are too large; mend an artifact with: dlp-deploy "
            f"export ARTIFACT --target none --baseline {precisions} --force, a sweep with: --block-size "
            f"{BASELINE_BLOCK_SIZE}"
        )
