"""Likelihoods of generated tokens, in the two forms that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .decoding import Piece
from .text import INCOMPLETE

TextOf = Callable[[int], str]


def of_completion(pieces: Sequence[Piece], text_of: TextOf) -> dict[str, Any]:
    """Lists with an entry for each token."""
    found = [(piece.likelihood, piece.offset) for piece in pieces if piece.likelihood is not None]
    return {
        "tokens": [text_of(likelihood.token) for likelihood, _ in found],
        "token_logprobs": [likelihood.logprob for likelihood, _ in found],
        "top_logprobs": [_by_text(likelihood.likeliest, text_of) for likelihood, _ in found],
        "text_offset": [offset for _, offset in found],
    }


def _by_text(likeliest: Sequence[tuple[int, float]], text_of: TextOf) -> dict[str, float]:
    """Of tokens with one text, the likeliest counts."""
    found: dict[str, float] = {}
    for token, logprob in likeliest:
        found.setdefault(text_of(token), logprob)
    return found


def of_chat(pieces: Sequence[Piece], text_of: TextOf) -> dict[str, Any]:
    """A list of tokens, each with the likeliest ones in its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of(token)
        # Of a token that is a part of a character, only the tokenizer knows the bytes.
        known = None if INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}

    found = [piece.likelihood for piece in pieces if piece.likelihood is not None]
    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.likeliest]}
        for one in found
    ]
    return {"content": content, "refusal": None}
