"""What every engine is asked, in one place, so that all of them are measured by the same code.

An engine brings a `Session`: a loaded model with a KV cache that can be extended. Clocks, greedy
choice and the likelihood of a text are here.
"""

from __future__ import annotations

import gc
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .frames import Arrays, receive, send

Reply = tuple[dict[str, Any], Arrays]


class Session(Protocol):
    """One engine in this process, made with the number of threads it may use.

    `versions` names the libraries that do the work.
    """

    versions: dict[str, str]

    def load(self, model: str, context: int, prompt: int, fill: int) -> None:
        """Load `model` with a KV cache for `context` tokens, ready to read prompts of `prompt` tokens behind
        `fill` others.

        With prompt 0 only `windows` will be called.
        """

    def restart(self) -> None:
        """Empty the KV cache."""

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """Append ids int64 [n] to the cache; the logits of the last one, float32 [vocabulary]."""

    def windows(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        """Logits of all positions of ids int64 [length], in order, in pieces float32 [some, vocabulary].

        Leaves nothing in the cache of `extend`.
        """


def generate(session: Session, ids: np.ndarray, prompt: int, new_tokens: int) -> dict[str, Any]:
    """Greedy decoding, timed around engine and arg max.

    The last `prompt` of `ids` are the timed prompt; what stands before them fills the cache untimed.
    `ttft_ms` is the time to the first new token, `samples_ms` that of each later one; `finite` says whether
    all logits were numbers, which is looked at between the timed parts.
    """
    pending = fill(session, ids, prompt)
    tokens: list[int] = []
    finite = True
    samples: list[float] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(new_tokens):
            start = time.perf_counter_ns()
            logits = session.extend(pending)
            token = int(logits.argmax())
            samples.append((time.perf_counter_ns() - start) / 1e6)
            finite = finite and bool(np.isfinite(logits).all())
            tokens.append(token)
            pending = np.array([token], dtype=np.int64)
    finally:
        gc.enable()
    return {"ttft_ms": samples[0], "samples_ms": samples[1:], "tokens": tokens, "finite": finite}


def follow(session: Session, ids: np.ndarray, prompt: int, tokens: np.ndarray) -> np.ndarray:
    """The logits that `generate` would see if it chose `tokens` int64 [n]; float32 [n + 1, vocabulary]."""
    rows = [session.extend(fill(session, ids, prompt))]
    rows.extend(session.extend(tokens[i : i + 1]) for i in range(len(tokens)))
    return np.stack(rows)


def fill(session: Session, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Put all but the last `prompt` of ids int64 [n] into an empty cache; the rest of them."""
    session.restart()
    if len(ids) > prompt:
        session.extend(ids[:-prompt])
    return ids[len(ids) - prompt :]


def window_nll(session: Session, windows: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each next token, in nats; windows int64 [n, L] -> float32 [n, L - 1]."""
    result = np.empty((len(windows), windows.shape[1] - 1), dtype=np.float32)
    for index, window in enumerate(windows):
        row, done = result[index], 0
        for piece in session.windows(window):
            targets = window[done + 1 : done + 1 + len(piece)]
            row[done : done + len(targets)] = _nll(piece[: len(targets)], targets)
            done += len(targets)
    return result


def _nll(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    peak = scores.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scores - peak).sum(axis=-1, dtype=np.float64))
    chosen = np.take_along_axis(scores - peak, targets[:, None], axis=-1)[:, 0]
    return total - chosen


def usage() -> dict[str, Any]:
    """Peak and present resident memory in bytes, and processor seconds, of this process alone."""
    kilobytes = {}
    for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            kilobytes[name] = int(value.split()[0])
    times = os.times()
    return {
        "peak_rss_bytes": kilobytes["VmHWM"] * 1024,
        "rss_bytes": kilobytes["VmRSS"] * 1024,
        "cpu_s": times.user + times.system,
    }


class _Worker:
    """Answers requests; each public method is one that the client may call."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prompt = 0

    def load(self, arrays: Arrays, model: str, context: int, prompt: int, fill: int) -> Reply:
        self.prompt = prompt
        start = time.perf_counter()
        self.session.load(model, context, prompt, fill)
        return {"load_s": time.perf_counter() - start}, {}

    def restart(self, arrays: Arrays) -> Reply:
        self.session.restart()
        return {}, {}

    def extend(self, arrays: Arrays) -> Reply:
        return {}, {"logits": self.session.extend(arrays["ids"])}

    def generate(self, arrays: Arrays, new_tokens: int) -> Reply:
        return generate(self.session, arrays["ids"], self.prompt, new_tokens), {}

    def follow(self, arrays: Arrays) -> Reply:
        return {}, {"logits": follow(self.session, arrays["ids"], self.prompt, arrays["tokens"])}

    def window_nll(self, arrays: Arrays) -> Reply:
        return {}, {"nll": window_nll(self.session, arrays["windows"])}

    def memory(self, arrays: Arrays) -> Reply:
        return usage(), {}


def serve(connection: socket.socket, start: Callable[[], Session]) -> None:
    """Greet with the engine's versions, then answer requests until the client closes."""
    try:
        session = start()
    except Exception as error:
        send(connection, _failure(error))
        return
    worker = _Worker(session)
    send(connection, {"versions": session.versions})
    while True:
        try:
            request, arrays = receive(connection)
        except EOFError:
            return
        try:
            body, results = getattr(worker, request["call"])(arrays, **request["arguments"])
        except Exception as error:
            body, results = _failure(error), {}
        send(connection, body, results)


def _failure(error: Exception) -> dict[str, Any]:
    # The traceback goes to the log of the worker; the client gets one line.
    traceback.print_exc()
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
