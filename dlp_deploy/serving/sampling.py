"""The choice of the next token from the logits of the last position, and how likely it was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` is the share of probability that is sampled from, in [0, 1]."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Likelihood:
    """The natural logarithm of a token's probability, and the likeliest tokens with theirs, likeliest first.

    As the model has them: `Sampling` changes nothing of it.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def likelihood(logits: NDArray[np.float32], token: int, most: int) -> Likelihood:
    """That of `token`, and the `most` likeliest (or all), by finite logits float32 [vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    # Not all are sorted: that would take as long as a token of a small model.
    most = min(most, len(logprobs))
    candidates = np.argpartition(-logprobs, most - 1)[:most]
    first = candidates[np.argsort(-logprobs[candidates])]
    return Likelihood(token, float(logprobs[token]), tuple((int(t), float(logprobs[t])) for t in first))


def choose_token(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """Draw a token from logits float32 [vocabulary]. Raises ValueError when one of them is not finite."""
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens, shares = nucleus(probabilities(logits, sampling.temperature), sampling.top_p)
    cumulative = shares.cumsum()
    drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(tokens[min(drawn, len(tokens) - 1)])


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """softmax(logits / temperature), float64 [vocabulary]; `temperature` > 0."""
    with np.errstate(over="ignore"):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def nucleus(shares: NDArray[np.float64], top_p: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fewest likeliest tokens whose probabilities add up to `top_p`, likeliest first, and their shares.

    Holtzman et al. 2020, section 3.1; at least one token, whatever `top_p` is.
    """
    if top_p >= 1:
        return np.arange(len(shares)), shares
    # Tokens below this add up to less than what may be left out, so they need not be sorted.
    floor = min((1 - top_p) / len(shares), shares.max())
    candidates = np.flatnonzero(shares >= floor)
    order = candidates[np.argsort(-shares[candidates], kind="stable")]
    count = int(np.searchsorted(shares[order].cumsum(), top_p)) + 1
    return order[:count], shares[order[:count]]
