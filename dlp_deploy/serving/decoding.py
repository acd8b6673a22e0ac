"""One engine, one sequence at a time: who has the turn, what the cache holds, and the pieces of text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np

from ..bench.worker import EngineWorker, WorkerError
from .sampling import Likelihood, Sampling, choose_token, likelihood
from .text import Detokenizer, StopStrings

# Tokens before the first new one that a decoder may look at for spaces and split characters.
TEXT_CONTEXT = 6

T = TypeVar("T")


class Busy(Exception):
    """As many requests wait for the engine as are let in."""


class Turns:
    """First come, first served: one has the engine, at most `waiting` others wait for it."""

    def __init__(self, waiting: int) -> None:
        self._waiting = waiting
        self._present = 0
        self._lock = asyncio.Lock()

    @property
    def waiting(self) -> int:
        return max(0, self._present - 1)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the engine and hold it for the body. Raises Busy at once when too many wait."""
        if self._present > self._waiting:
            raise Busy
        self._present += 1
        try:
            async with self._lock:
                yield
        finally:
            self._present -= 1


class EngineFault(Exception):
    """The engine refused a request, or gave logits that are no numbers; it still takes others."""


class CachedEngine:
    """A loaded worker and the tokens that its KV cache holds. Its calls block.

    They raise EngineFault when the engine goes on living, and WorkerError when it does not.
    """

    def __init__(self, worker: EngineWorker) -> None:
        self._worker = worker
        self._held: list[int] = []

    def begin(self, prompt: Sequence[int]) -> int:
        """Make the cache a proper beginning of `prompt`, if only an empty one; return its length.

        The next turn of a conversation begins with all that came before, which is then not read again.
        """
        held = len(self._held)
        if held < len(prompt) and list(prompt[:held]) == self._held:
            return held
        self.restart()
        return 0

    def restart(self) -> None:
        """Empty the cache."""
        self._worker.restart()
        self._held = []

    def extend(self, ids: Sequence[int]) -> np.ndarray:
        """Append to the cache; the logits of the last token, float32 [vocabulary]."""
        try:
            logits = self._worker.extend(np.array(ids, dtype=np.int64))
        except WorkerError as error:
            self._restart_behind(error)
            raise EngineFault(str(error)) from error
        self._held.extend(ids)
        return logits

    def _restart_behind(self, error: WorkerError) -> None:
        """Empty the cache, which may hold half a call; raise `error` when nobody is there to do so."""
        try:
            self.restart()
        except WorkerError:
            raise error from None


@dataclass(frozen=True)
class Job:
    """What to generate: at most `max_tokens` tokens after `prompt`.

    `continues` says that the text goes on where the prompt's ends, rather than being one of its own.
    `likeliest` is how many of the likeliest tokens are wanted for each place, None where no likelihoods are.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    continues: bool = True
    likeliest: int | None = None


@dataclass(frozen=True)
class Step:
    """One generated token, and how likely it was, if that is wanted."""

    token: int
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Piece:
    """Text of one step, `tokens` generated so far, and `reused` prompt tokens that were in the cache.

    The last piece has a `finish`: "stop" at an end token or stop string, else "length". `likelihood` is that
    of the step's token, if it is wanted and no end token; its text begins `offset` characters behind the
    beginning of the reply.
    """

    text: str
    tokens: int
    reused: int
    finish: Literal["stop", "length"] | None = None
    likelihood: Likelihood | None = None
    offset: int = 0


class Generator:
    """Runs jobs on an engine, one after the other.

    `decode` turns token ids into text; `ends` are the tokens that end a text; those below `vocabulary`
    are generated. Prompts are read `prompt_step` tokens at a time, and at most `waiting` requests wait for
    the one that runs. `lost` is told of the engine's death, from another thread. `generated` counts the
    tokens of all jobs so far.
    """

    def __init__(
        self,
        engine: CachedEngine,
        decode: Callable[[Sequence[int]], str],
        ends: frozenset[int],
        vocabulary: int,
        prompt_step: int,
        waiting: int,
        lost: Callable[[WorkerError], None],
    ) -> None:
        self._engine, self._decode, self._ends, self._vocabulary = engine, decode, ends, vocabulary
        self._prompt_step, self._lost = prompt_step, lost
        self.turns = Turns(waiting)
        self.generated = 0
        # One thread: a call that its client gave up on ends before the next one begins.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    def close(self) -> None:
        """Take no more work. A call that hangs is not waited for: it ends with its worker."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def find_out(self) -> None:
        """Ask an engine that seems dead, so that `lost` is told how it died."""
        with suppress(RuntimeError):  # closed
            self._thread.submit(self._guarded, self._engine.restart)

    async def pieces(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The texts of `jobs` in one turn, token by token, each piece with the index of its job.

        Closing the iterator ends the work within one token. Raises Busy before anything else, EngineFault
        when the engine cannot answer this, and WorkerError when it died.
        """
        async with self.turns.turn():
            for index, job in enumerate(jobs):
                async with aclosing(self._pieces(job)) as pieces:
                    async for piece in pieces:
                        yield index, piece

    async def _pieces(self, job: Job) -> AsyncGenerator[Piece, None]:
        before = job.prompt[-TEXT_CONTEXT:] if job.continues else ()
        text, stops = Detokenizer(self._decode, before), StopStrings(job.stops)
        async with aclosing(self._tokens(job)) as tokens:
            count = end = 0
            async for step, reused in tokens:
                count += 1
                if step.token in self._ends:
                    yield Piece(stops.push(text.finish()) + stops.finish(), count, reused, "stop")
                    return
                offset, settled = end, text.push(step.token)
                end += len(settled)
                piece = Piece(stops.push(settled), count, reused, None, step.likelihood, offset)
                if stops.found:
                    yield replace(piece, finish="stop")
                    return
                if count < job.max_tokens:
                    yield piece
            rest = stops.push(text.finish()) + stops.finish()
            yield replace(piece, text=piece.text + rest, finish="stop" if stops.found else "length")

    async def _tokens(self, job: Job) -> AsyncGenerator[tuple[Step, int], None]:
        random = np.random.default_rng(None if job.seed is None else job.seed % 2**64)
        reused = await self._call(self._engine.begin, job.prompt)
        pending = job.prompt[reused:]
        while len(pending) > self._prompt_step:
            await self._call(self._engine.extend, pending[: self._prompt_step])
            pending = pending[self._prompt_step :]
        for _ in range(job.max_tokens):
            step = await self._call(self._next, pending, job, random)
            pending = (step.token,)
            self.generated += 1
            yield step, reused

    def _next(self, ids: Sequence[int], job: Job, random: np.random.Generator) -> Step:
        logits = self._engine.extend(ids)[: self._vocabulary]
        try:
            token = choose_token(logits, job.sampling, random)
        except ValueError as error:
            self._engine.restart()
            raise EngineFault(str(error)) from None
        return Step(token, None if job.likeliest is None else likelihood(logits, token, job.likeliest))

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._guarded, function, *arguments)

    def _guarded(self, function: Callable[..., T], *arguments: Any) -> T:
        # Here, and not where the answer is awaited: the client who asked may have left.
        try:
            return function(*arguments)
        except WorkerError as error:
            self._lost(error)
            raise
