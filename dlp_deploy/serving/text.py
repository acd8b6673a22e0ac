"""From tokens to text as they come: only what later tokens cannot change is given out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder puts in place of bytes that are no character, or not yet.
INCOMPLETE = "\ufffd"


class Detokenizer:
    """Text of a growing sequence of tokens, piece by piece; the pieces joined are the text.

    `decode` turns token ids into text. `before` are tokens that stand before the sequence: with them,
    the first piece keeps the space that a decoder strips where a text begins.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        # Decoded again with each token: those of the last piece, for context, and those since.
        self._ids = list(before)
        self._context = len(self._ids)
        self._given = len(decode(self._ids).rstrip(INCOMPLETE))

    def push(self, token: int) -> str:
        """The text that is settled by `token`; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        settled = text.rstrip(INCOMPLETE)
        piece = settled[self._given :]
        self._given += len(piece)
        if piece and settled == text:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._given = len(self._decode(self._ids))
        return piece

    def finish(self) -> str:
        """What is left when no more tokens come: bytes that make no character."""
        return self._decode(self._ids)[self._given :]


class StopStrings:
    """Lets text through up to the first stop string, whichever ends first.

    The end of the text is held back for as long as it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be given out. After `found` has become true, nothing more is."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
