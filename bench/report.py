"""The report of a bench: what report.json holds, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError

SCHEMA: Literal[1] = 1
SCHEMA_FILE = Path(__file__).resolve().parent / "schema" / "report.json"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LatencyMs(_Stored):
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class OutputAgreement(_Stored):
    """Agreement of the engine's logits with torch in fp32, checked before any timing.

    Errors are max and mean |engine - torch| / max |torch| (null: not a finite number); the one that
    `limited` names was held to `limit`. `graph_max_rel_error` and `graph_mean_rel_error` are the same
    against ONNX Runtime on the very same graph. `greedy_match` is the share of positions with the same
    arg max as torch.
    """

    max_rel_error: float | None
    mean_rel_error: float | None
    greedy_match: float
    positions: int
    limited: Literal["max_rel_error", "mean_rel_error"]
    limit: float
    graph_max_rel_error: float | None = None
    graph_mean_rel_error: float | None = None


class DepthAgreement(_Stored):
    """Agreement at the depth that is timed: the logits after the prompt and after each of the next tokens of
    the text, against `reference` (torch in fp32, or the name of an fp32 run of the same model); in the very
    process that is timed, unless memory did not hold all models at once. Errors as in OutputAgreement; the
    one that `limited` names was held to `limit`.
    """

    reference: str
    depth: int
    positions: int
    max_rel_error: float | None
    mean_rel_error: float | None
    greedy_match: float
    limited: Literal["max_rel_error", "mean_rel_error"]
    limit: float


class NoiseRecord(_Stored):
    """What disturbed timed generation, as shares of the time of the used cores, `core_s` seconds in all: what
    a hypervisor took, what other processes used (below zero: the run worked outside of its cores), what
    ran on the sibling threads of these cores, and what a cgroup's quota took. `beside_share` is how
    busy the other cores of the machine were, which share its memory.
    """

    stolen_share: float
    others_share: float
    siblings_share: float = 0.0
    beside_share: float = 0.0
    throttled_share: float = 0.0
    core_s: float = 0.0


class Roofline(_Stored):
    """What decoding one token must move and compute at least, and how near the run came to the machine's
    roofs (Williams, Waterman & Patterson, 2009) at its median time per token.

    `weight_bytes` and `kv_bytes` are read per token, the cache at the mean depth of the timed tokens.
    `estimated`: the engine's layout of sparse weights is not public, so that `weight_bytes` is an estimate:
    nonzeros plus one bit per weight, or what is stored where that is less. `operations` are
    multiplications and additions; `bound` is the roof that is nearer.
    """

    weight_bytes: int
    kv_bytes: int
    operations: int
    estimated: bool
    gbps: float
    gops: float
    bandwidth_share: float
    compute_share: float | None
    bound: Literal["bandwidth", "compute"]

    @property
    def share(self) -> float:
        """Of the roof that is nearer."""
        return max(self.bandwidth_share, self.compute_share or 0.0)


class Run(_Stored):
    """One model in one engine. A run that is not "ok" has a reason, and no latencies. One that is "ok" and
    has a reason ended early: its latencies are those of the rounds that it finished.

    The cache holds `filled_tokens` before the prompt, untimed. `tokens_sha256` is over the int64 ids of
    the tokens that the first round generated; `same_tokens` says whether all rounds generated them.
    `settled`: the time per token had settled when the warm-up ended. `samples_ms` are the times of all
    tokens after the first, round after round, `samples_per_round` of them each; `ttft_samples_ms` holds
    one time a round. `blocks` is how many decoder blocks the model had, where it had not all of them. A
    run with `extrapolated_from` was not made: its samples are the medians of the rounds of those two
    runs, carried on to all blocks.
    """

    name: str
    engine: str
    precision: str
    sparsity: float
    dense: bool
    status: Literal["ok", "wrong output", "failed"]
    reason: str = ""
    cores: int
    prompt_tokens: int
    new_tokens: int
    context: int
    filled_tokens: int | None = None
    weight_bytes: int
    block_size: int | None = Field(
        default=None,
        description="inputs that share a scale of the weights; null: all, no quantization, or not recorded",
    )
    load_s: float | None = None
    ttft_ms: LatencyMs | None = None
    tpot_ms: LatencyMs | None = None
    tokens_per_s: float | None = None
    peak_rss_bytes: int | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    warm_ups: int = 0
    settled: bool = True
    tokens_sha256: str | None = None
    same_tokens: bool = True
    drift: float | None = Field(default=None, description="largest relative deviation of a round's median")
    samples_per_round: int = 0
    samples_ms: tuple[float, ...] = ()
    ttft_samples_ms: tuple[float, ...] = ()
    blocks: int | None = None
    extrapolated_from: tuple[str, ...] = ()
    roofline: Roofline | None = None
    output_check: OutputAgreement | None = None
    depth_check: DepthAgreement | None = None
    noise: NoiseRecord | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _timed_by_samples(self) -> Run:
        if self.tpot_ms is None:
            return self
        if not self.ttft_samples_ms or not self.samples_ms:
            raise ValueError("a timed run needs samples_ms and ttft_samples_ms")
        if self.samples_per_round < 1 or len(self.samples_ms) % self.samples_per_round:
            raise ValueError("samples_ms of a timed run must be whole rounds of samples_per_round")
        return self

    @property
    def samples(self) -> np.ndarray:
        """`samples_ms` as float64 [rounds, samples_per_round]."""
        return np.array(self.samples_ms).reshape(-1, self.samples_per_round)


class Comparison(_Stored):
    """How many times faster `run` decodes than `baseline`: the median of the paired ratios of their
    times per token, with the 95 % interval that the ratios of single rounds give (null for one round);
    `ttft_speedup` is the ratio of the median times to the first token."""

    run: str
    baseline: str
    speedup: float
    ci95: tuple[float, float] | None
    ttft_speedup: float


class EngineRecord(_Stored):
    title: str
    licence: str
    versions: dict[str, str]
    notes: tuple[str, ...]


class Environment(_Stored):
    cpu: str
    architecture: str
    isa: tuple[str, ...]
    sockets: int
    numa_nodes: int
    physical_cores: int
    logical_cores: int
    usable_cores: int
    cpu_quota: float | None
    cores_used: tuple[int, ...]
    nodes_used: tuple[int, ...] = Field(default=(), description="NUMA nodes of the used cores")
    nodes_with_memory: tuple[int, ...] = Field(
        default=(), description="NUMA nodes whose memory could be used; empty where the report does not tell"
    )
    caches: dict[str, int]
    cache_bytes: int | None = Field(
        default=None, description="what the L2 and L3 caches of the used cores hold together"
    )
    governor: str | None
    hypervisor: bool
    memory_bytes: int
    clock_ghz: float | None = Field(
        default=None,
        description="the base clock, or where it is not known, the highest of any core at the time",
    )
    memory_bandwidth_gbps: float = Field(description="read bandwidth of the used cores, 1e9 bytes a second")
    memory_bandwidth_spread: float | None = Field(
        default=None, description="by how much it differed before and after the runs, relative to the larger"
    )
    peak_fp32_gops: float | None = Field(
        default=None,
        description="best rate of fp32 matrix products on the used cores, 1e9 operations a second",
    )
    peak_int8_gops: float | None = Field(default=None, description="the same in int8")
    kernel: str
    operating_system: str
    versions: dict[str, str]
    engines: dict[str, EngineRecord]
    git_revision: str | None


class Evaluated(_Stored):
    """The text that perplexity was taken on; `sha256` is over the int64 token ids."""

    data: str
    windows: int
    tokens_per_window: int
    sha256: str


class Report(_Stored):
    """One bench of one artifact."""

    schema_version: Literal[1] = Field(alias="schema")
    created: str
    dlp_deploy: str
    artifact: str
    model: str
    command: dict[str, Any] = Field(description="the arguments that repeat this bench")
    environment: Environment
    evaluation: Evaluated | None
    all_loaded: bool = Field(description="whether all models were in memory at once")
    runs: tuple[Run, ...] = Field(min_length=1)
    comparisons: tuple[Comparison, ...]
    noise: NoiseRecord
    warnings: tuple[str, ...]

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="after")
    def _compares_timed_runs(self) -> Report:
        timed = {run.name for run in self.runs if run.tpot_ms}
        for comparison in self.comparisons:
            if missing := {comparison.run, comparison.baseline} - timed:
                raise ValueError(f"comparisons need timed runs, and {min(missing)} is none")
        return self

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def speedup_over(self, run: str, baseline: str | None) -> Comparison | None:
        """The comparison of `run` with `baseline`, or None where one of them was not timed."""
        matching = (c for c in self.comparisons if (c.run, c.baseline) == (run, baseline))
        return next(matching, None)

    @property
    def dense_fp32(self) -> str | None:
        """The baseline of the paper's comparison, if it was timed: ONNX Runtime's where there are others."""
        found = [run for run in self.runs if run.dense and run.tpot_ms and run.precision == "fp32"]
        return min(found, key=lambda run: run.engine != "onnxruntime").name if found else None

    @property
    def best_dense(self) -> str | None:
        """The dense baseline with the shortest median time per token."""
        medians = {run.name: run.tpot_ms.p50 for run in self.runs if run.dense and run.tpot_ms}
        return min(medians, key=lambda name: medians[name], default=None)


def to_json(report: Report) -> str:
    return report.model_dump_json(indent=2, by_alias=True) + "\n"


def read_report(path: Path) -> Report:
    """Read a report.json. Raises UserError when it is missing, unreadable or of an unknown schema."""
    if path.suffix == ".jsonl":
        raise UserError(f"{path} holds the points of a sweep; give the report.json of a bench")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the report.json of a bench"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no bench report, but no text; give a report.json") from None
    _require_known_schema(path, text)
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{path} has a field {field}, which this dlp-deploy does not know; read it with the newer "
                "one that wrote it"
            ) from None
        raise UserError(f"{path} is no bench report: {field or 'JSON'}: {first['msg']}") from None


def _require_known_schema(path: Path, text: str) -> None:
    try:
        stored = json.loads(text)
    except ValueError:
        return
    if isinstance(stored, dict) and stored.get("schema", SCHEMA) != SCHEMA:
        raise UserError(
            f"{path} is a report of schema {stored['schema']}, and this dlp-deploy reads {SCHEMA}; read it "
            "with the dlp-deploy that wrote it, or measure again"
        )


def json_schema() -> str:
    """The JSON Schema of report.json, as kept in schema/report.json."""
    return json.dumps(Report.model_json_schema(by_alias=True), indent=2) + "\n"
