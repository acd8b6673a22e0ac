"""Requests that the server cannot answer: each is told what is wrong with it, as OpenAI words it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from .servers import NAME, POSITIONS, ServerProcess, chat, complete, serving


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"model": "gpt-4"}, "model", "there is no model 'gpt-4' here; this server has 'tiny-dlp-s70'"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens", "valid integer"),
        ({"max_tokens": POSITIONS}, "prompt", "the context has 4096 tokens; .* do not fit"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": 40, "prompt": ["a", "b"]}, "n", "2 prompts with 40 choices are too many"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"echo": True}, "echo", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"extra_body": {"top_k": 5}}, "top_k", "not supported"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [1, 100_000]}, "prompt", "token 100000 is not in the model's vocabulary of 520"),
        ({"prompt": {"text": "x"}}, "prompt", "valid"),
        ({"prompt": None}, "prompt", "valid"),
    ],
)
def test_a_request_that_cannot_be_answered_says_which_field(
    client: OpenAI, options: dict[str, Any], param: str, message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message) as raised:
            complete(client, **{"max_tokens": 4, "stream": stream} | options)
        assert raised.value.status_code == (404 if param == "model" else 400)
        assert raised.value.param.startswith(param)


def test_what_asks_for_nothing_is_taken(client: OpenAI) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "logit_bias": {}}
    neutral |= {"logprobs": False}
    assert complete(client, max_tokens=2, stop=None, **neutral).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages: .*at least 1 item"),
        ([("robot", "x")], "messages.0.role"),
        ([("user", None)], "messages.0.content"),
        ([("user", [{"type": "image_url", "image_url": {"url": "x"}}])], "messages.0.content.0.type"),
        ([("tool", "x")], "chat template: no tools here"),
        ([("user", "one")], "chat template: unsupported operand"),
    ],
)
def test_a_chat_that_cannot_be_answered_says_why(client: OpenAI, messages: list[Any], match: str) -> None:
    with pytest.raises(openai.BadRequestError, match=match):
        chat(client, *messages)


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        (b'{"model":', "application/json", "the body is not JSON"),
        (b"[1]", "application/json", "must be a JSON object"),
        (b"model=x", "application/x-www-form-urlencoded", "must be a JSON object, sent as application/json"),
        (b'{"model": "tiny-dlp-s70", "prompt": "\\ud800"}', "application/json", "prompt"),
        (b'{"model": "tiny-dlp-s70", "prompt": "x", "temperature": NaN}', "application/json", "temperature"),
        (b"[" * 200_000, "application/json", "parsing the body"),
        (b"9" * 10_000, "application/json", "parsing the body"),
    ],
)
def test_bodies_that_are_no_request_are_refused(
    server: ServerProcess, content: bytes, kind: str, match: str
) -> None:
    reply = httpx.post(f"{server.url}/completions", content=content, headers={"content-type": kind})
    assert reply.status_code == 400
    assert match in reply.json()["error"]["message"]


def test_unknown_paths_have_errors_in_the_same_form(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/completions").status_code == 405


def test_a_local_server_answers_to_local_names_only(server: ServerProcess) -> None:
    reply = httpx.get(f"{server.url}/models", headers={"host": "a.web.page:80"})
    assert reply.status_code == 400
    port = httpx.URL(server.url).port
    assert httpx.get(f"{server.url}/models", headers={"host": f"localhost:{port}"}).status_code == 200


@pytest.mark.parametrize(("host", "address"), [("127.0.0.2", "127.0.0.2"), ("0X7F.3", "127.0.0.3")])
def test_a_local_server_answers_to_the_name_that_it_was_given(served: Path, host: str, address: str) -> None:
    with serving(served, host=host, context=64) as server:
        assert httpx.URL(server.url).host == address
        port = httpx.URL(server.url).port
        given = httpx.get(f"{server.url}/models", headers={"host": f"{host}:{port}"})
        assert given.status_code == 200
        assert complete(server.client, max_tokens=1).usage.completion_tokens == 1
        reply = httpx.get(f"{server.url}/models", headers={"host": "a.web.page:80"})
        assert reply.status_code == 400


def test_a_body_that_no_context_holds_is_refused_while_it_comes(
    server: ServerProcess, client: OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="the context has 4096 tokens"):
        complete(client, "a b " * 700_000)
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match="the body is too long") as raised:
            complete(client, "a b " * 3_000_000, stream=stream)
        assert (raised.value.status_code, raised.value.type) == (413, "invalid_request_error")

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**16

    assert httpx.post(f"{server.url}/completions", content=endless(), timeout=60).status_code == 413
    assert complete(client, max_tokens=1).usage.completion_tokens == 1
