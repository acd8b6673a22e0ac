"""The HTTP side: routes, and answers whole or in a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from .body_limit import BodyLimit
from .codec import Codec
from .decoding import Generator, Job
from .failures import ApiError, add_error_handlers, error_of
from .logprobs import of_chat, of_completion
from .protocol import MAX_CHOICES, MAX_PROMPTS, ChatRequest, Choice, CompletionRequest, Reply

# OpenAI's default for completions, where there is room for so many; a chat reply may fill the context.
COMPLETION_TOKENS = 16
# Of a body: what a token takes when every prompt fills the context, and what all the rest may.
TOKEN_BYTES = 8
OTHER_BYTES = 2**20
# How long a client may leave a stream unread once all buffers on the way are full.
STALLED_S = 15

AnyRequest = CompletionRequest | ChatRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """One model behind the server. `context` is the most tokens that prompt and reply have together."""

    name: str
    created: int
    context: int
    codec: Codec
    generator: Generator


def create_app(served: Served) -> FastAPI:
    app = FastAPI(title="dlp-deploy", docs_url=None, redoc_url=None)
    add_error_handlers(app)
    app.add_middleware(BodyLimit, limit=OTHER_BYTES + TOKEN_BYTES * MAX_PROMPTS * served.context)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        generator = served.generator
        return {"status": "ok", "waiting": generator.turns.waiting, "generated_tokens": generator.generated}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return _model_card(served)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_model(served, body.model)
        prompts = [await asyncio.to_thread(served.codec.encode, prompt) for prompt in body.prompts]
        return await _answer(served, request, body, prompts)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        _check_model(served, body.model)
        prompt = await asyncio.to_thread(served.codec.encode_chat, body.messages)
        return await _answer(served, request, body, [prompt])

    return app


def _model_card(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "dlp-deploy",
        "max_model_len": served.context,
    }


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        message = f"there is no model {name!r} here; this server has {served.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _jobs(served: Served, body: AnyRequest, prompts: Sequence[list[int]]) -> list[Job]:
    """What to generate for each prompt, as often as there are choices; seeds differ between these."""
    if len(prompts) * body.choices > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts with {body.choices} choices are too many", param="n")
    limits = [_limit(served, body, len(prompt)) for prompt in prompts]
    continues = isinstance(body, CompletionRequest)
    seeds = [None if body.seed is None else body.seed + choice for choice in range(body.choices)]
    return [
        Job(tuple(prompt), limit, body.sampling, seed, body.stops, continues, body.likeliest)
        for prompt, limit in zip(prompts, limits, strict=True)
        for seed in seeds
    ]


def _limit(served: Served, body: AnyRequest, length: int) -> int:
    """The most tokens to generate behind a prompt of this length. Raises ApiError when they do not fit."""
    room = served.context - length
    usual = room if isinstance(body, ChatRequest) else min(room, COMPLETION_TOKENS)
    limit = body.limit or max(1, usual)
    if limit > room:
        raise ApiError(
            400,
            f"the context has {served.context} tokens; {length} in the prompt and {limit} to generate "
            "do not fit; shorten the prompt, or lower max_tokens",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    return limit


async def _answer(
    served: Served, request: Request, body: AnyRequest, prompts: Sequence[list[int]]
) -> Response:
    jobs = _jobs(served, body, prompts)
    reply = _reply(served, body, sum(map(len, prompts)))
    if not body.stream:
        return await _while_connected(request, _whole(served, jobs, reply))
    events = _events(served, jobs, reply, body.streams_usage)
    # Up to the first event, a full queue or a dead engine can still be an HTTP status.
    return await _while_connected(request, _started(events))


def _reply(served: Served, body: AnyRequest, prompt_tokens: int) -> Reply:
    chat = isinstance(body, ChatRequest)
    form = partial(of_chat if chat else of_completion, text_of=served.codec.text_of)
    wanted = body.likeliest is not None
    return Reply(served.name, chat, body.choices, prompt_tokens, form if wanted else None)


async def _whole(served: Served, jobs: list[Job], reply: Reply) -> Response:
    choices = [Choice() for _ in jobs]
    async with aclosing(served.generator.pieces(jobs)) as pieces:
        async for index, piece in pieces:
            choices[index].add(piece)
    return JSONResponse(reply.whole(choices))


async def _events(
    served: Served, jobs: list[Job], reply: Reply, with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    choices = [Choice() for _ in jobs]
    async with aclosing(served.generator.pieces(jobs)) as pieces:
        async for index, piece in pieces:
            if not choices[index].tokens and (opening := reply.opening(index)):
                yield opening
            choices[index].add(piece)
            if piece.text or piece.finish or piece.likelihood is not None:
                yield reply.chunk(index, piece)
    if with_usage:
        yield reply.closing(choices)


async def _started(events: AsyncGenerator[dict[str, Any], None]) -> Response:
    return _EventStream(await anext(events), events)


class _EventStream(StreamingResponse):
    """Server-sent events, ended by "[DONE]".

    The generation ends with it when the client leaves, or does not read: others wait for the engine.
    """

    def __init__(self, first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(first), media_type="text/event-stream", headers=headers)
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        async def timely(message: Message) -> None:
            with anyio.fail_after(STALLED_S):
                await send(message)

        try:
            await super().stream_response(timely)
        except TimeoutError:
            logger.warning("a stream was cut: its client read nothing for %d s", STALLED_S)

    async def _lines(self, first: dict[str, Any]) -> AsyncIterator[str]:
        yield _line(first)
        try:
            async for event in self._rest:
                yield _line(event)
        except Exception as error:
            told = error_of(error)
            if told.code is None:
                logger.error("a stream failed", exc_info=error)
            yield _line(told.body())
        yield "data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> str:
    # In ASCII: clients that split lines as Python does would split at some other characters as well.
    return f"data: {json.dumps(event)}\n\n"


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled when the client leaves before."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads the answer to a client that left; 499 is what logs usually call it.
        return task.result() if task.done() else Response(status_code=499)
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
