"""What is measured, and what is known of each run while it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..errors import UserError
from ..perplexity import Perplexity
from .agreement import Agreement, DepthCheck
from .cgroups import available_memory
from .noise import Noise
from .plan import Candidate
from .worker import TIME_LIMIT_S, Generation

Status = Literal["ok", "wrong output", "failed"]

# Decoding into an emptier cache flatters sparse weights.
CONTEXT = 512
# DeepSparse reads several tokens at once only where they begin at a multiple of as many, 16 at least.
FILL_STEP = 16
# Beyond that the operating system's timer does not count.
LONGEST_LIMIT_S = 1e6
# Positions at which outputs are compared at the depth that is timed.
CHECKED_AT_DEPTH = 8
LOGIT_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """What every run does. `ids` int64: tokens that fill the cache, then the prompt of `prompt_tokens`.

    `following` int64 are the tokens of the text after that, on which outputs are checked at that depth, and
    `torch_at_depth` float32 [len(following) + 1, vocabulary] what torch in fp32 says there of the models that
    it was asked of, by the `weights` of their candidates. A worker that gives no answer for `time_limit_s`
    has failed.
    """

    cores: tuple[int, ...]
    ids: np.ndarray
    prompt_tokens: int
    new_tokens: int
    context: int
    repeats: int
    following: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    torch_at_depth: Mapping[str, np.ndarray] = field(default_factory=dict)
    time_limit_s: float = TIME_LIMIT_S

    @property
    def cached_tokens(self) -> int:
        """Tokens that the KV cache has room for: the last token generated is never fed."""
        return self.context - 1

    @property
    def filled_tokens(self) -> int:
        """Tokens in the cache before the timed prompt."""
        return len(self.ids) - self.prompt_tokens


def usual_context(prompt_tokens: int, new_tokens: int, positions: int) -> int:
    """The depth to time at unless told: CONTEXT, or as much as a model of `positions` holds, or as prompt and
    new tokens take."""
    return max(prompt_tokens + new_tokens, min(CONTEXT, positions))


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


def check_time_limit(seconds: float) -> None:
    """Raise UserError for a time that no worker can be given."""
    if not 0 < seconds <= LONGEST_LIMIT_S:
        raise UserError(
            f"--time-limit {seconds:g}: give seconds, more than none and at most {LONGEST_LIMIT_S:.0f}"
        )


def holds_logits(positions: int, vocabulary: int) -> bool:
    """Whether memory has room for the float32 logits of so many positions beside all else."""
    return LOGIT_BYTES * positions * vocabulary <= available_memory() / 4


def text_lengths(prompt_tokens: int, new_tokens: int, context: int) -> tuple[int, int]:
    """Tokens to cache and to read as the prompt, and tokens after them to check outputs on.

    What fills the cache before the prompt is a multiple of FILL_STEP: less than that is left of the context.
    """
    fill = (context - prompt_tokens - new_tokens) // FILL_STEP * FILL_STEP
    return fill + prompt_tokens, min(CHECKED_AT_DEPTH, new_tokens - 1)


@dataclass
class Outcome:
    """What is known of one run; grows while it is measured. `ended`: it is not measured any further."""

    candidate: Candidate
    status: Status = "ok"
    reason: str = ""
    ended: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    load_s: float = 0.0
    agreement: Agreement | None = None
    at_depth: np.ndarray | None = None
    depth: DepthCheck | None = None
    warm_ups: int = 0
    settled: bool = True
    generations: list[Generation] = field(default_factory=list)
    noise: Noise = field(default_factory=Noise)
    peak_rss_bytes: int = 0
    perplexity: Perplexity | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def samples_ms(self) -> np.ndarray:
        """Time of each token after the first, float64 [rounds, new_tokens - 1]."""
        return np.array([generation.samples_ms for generation in self.generations])

    @property
    def tokens_sha256(self) -> str:
        """Over the int64 ids of the tokens of the first round."""
        return hashlib.sha256(np.array(self.generations[0].tokens, dtype=np.int64).tobytes()).hexdigest()

    @property
    def same_tokens(self) -> bool:
        """Whether all rounds generated the same."""
        return len({generation.tokens for generation in self.generations}) <= 1

    def reject(self, reason: str) -> None:
        """Its output is wrong: it has no latencies."""
        self.status, self.reason, self.ended = "wrong output", reason, True
        self.generations.clear()

    def fail(self, reason: str) -> None:
        """It cannot go on. What whole rounds it has are kept."""
        self.reason, self.ended = reason, True
        if not self.generations:
            self.status = "failed"


def live(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if not outcome.ended]
