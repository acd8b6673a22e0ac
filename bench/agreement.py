"""Whether an engine computes what torch computes: on the reference text, and at the depth that is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..artifact import OutputCheck
from ..export.reference import Reference
from ..export.verify import ENGINE_RATIO, compare_logits
from .plan import Candidate

# Float32 graphs differ from torch by the order of sums: 1e-6 to 1e-5 of the largest logit in all
# engines. A thousandth means that the engine computes something else.
FP32_LIMIT = 1e-3
# Without that measure there is only what a right graph has never reached.
UNMEASURED_LIMIT = 0.1
# How much more the mean error of a quantized graph may be on the few positions at depth, of another text.
DEPTH_RATIO = 3.0
# But never as much as logits of other positions, which is what a wrong cache leads to, unless coarse
# quantization alone comes near to that.
UNRELATED_SHARE = 0.8


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
        return _limited_error(self.torch, self.limited)

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class DepthCheck:
    """An engine's logits at the depth that is timed, held against those of `reference`."""

    reference: str
    check: OutputCheck
    limited: Literal["max_rel_error", "mean_rel_error"]
    limit: float

    @property
    def error(self) -> float:
        return _limited_error(self.check, self.limited)

    @property
    def holds(self) -> bool:
        return self.error <= self.limit


def compare(candidate: Candidate, logits: np.ndarray, reference: Reference) -> Agreement:
    """Hold float32 logits [positions, vocabulary] against torch, as closely as the precision allows."""
    engine = candidate.engine.name
    torch = compare_logits(engine, "torch", logits, reference.logits)
    if candidate.precision == "fp32":
        return Agreement(torch, None, "max_rel_error", FP32_LIMIT)
    if reference.graph_logits is None or not np.isfinite(reference.graph_logits).all():
        return Agreement(torch, None, "mean_rel_error", UNMEASURED_LIMIT)
    graph = compare_logits(engine, "onnxruntime", logits, reference.graph_logits)
    quantization = compare_logits("onnxruntime", "torch", reference.graph_logits, reference.logits)
    return Agreement(torch, graph, "mean_rel_error", ENGINE_RATIO * quantization.mean_rel_error)


def compare_at_depth(
    candidate: Candidate, agreement: Agreement, logits: np.ndarray, expected: np.ndarray, reference: str
) -> DepthCheck:
    """Hold float32 logits [positions, vocabulary] against those of fp32 on the same model and text.
    `agreement` is what was found at the beginning of a text."""
    check = compare_logits(candidate.engine.name, "torch", logits, expected)
    limit = agreement.limit
    if candidate.precision != "fp32":
        limit = min(DEPTH_RATIO * limit, max(limit, UNRELATED_SHARE * _between_positions(expected)))
    return DepthCheck(reference, check, agreement.limited, limit)


def _between_positions(logits: np.ndarray) -> float:
    """The mean difference of logits [positions, vocabulary] from those a position before, of the largest."""
    return float(np.abs(np.diff(logits, axis=0)).mean() / np.abs(logits).max())


def disagreement(found: Agreement | DepthCheck) -> str:
    """In words by how much one that does not hold is beyond its limit."""
    if isinstance(found, Agreement):
        check, against, where = found.torch, "torch", ""
    else:
        check, against, where = found.check, found.reference, " at the timed depth"
    which = found.limited.split("_")[0]
    return (
        f"the {which} error of its logits{where} against {against} is {found.error:.1e} of the largest "
        f"(limit {found.limit:.1e}); same arg max at {check.greedy_match:.0%} of {check.positions}"
    )


def _limited_error(check: OutputCheck, limited: str) -> float:
    return check.max_rel_error if limited == "max_rel_error" else check.mean_rel_error


def first_positions(reference: Reference, length: int) -> Reference | None:
    """The reference of the first `length` tokens of its text; None where its prompt is longer."""
    if length < reference.prompt:
        return None
    rows = length - reference.prompt + 1
    graph = reference.graph_logits
    return Reference(
        reference.ids[:length],
        reference.prompt,
        reference.logits[:rows],
        None if graph is None else graph[:rows],
    )
