"""The server, asked by the real client: the right text, also where other clients leave or are many."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlp_deploy.artifact import CHECKPOINT, read_manifest
from dlp_deploy.bench.environments import install

from .artifacts import sealed
from .servers import (
    EMBEDDED,
    NAME,
    POSITIONS,
    ServerProcess,
    chat,
    complete,
    serving,
    wait_until,
)
from .tiny_models import VOCABULARY, torch_model

PROMPTS = ["def main():", "The quick brown fox", "import", "Grüße, 世界 😀", "a = [1, 2, 3]", "x" * 300]
# More than any test waits for.
ENDLESS = POSITIONS - 400
Greedy = Callable[[str, int], list[int]]


@pytest.fixture(scope="module")
def deepsparse_server(served: Path) -> Iterator[ServerProcess]:
    install("deepsparse")
    with serving(served, engine="deepsparse", precision="fp32", context=2048) as process:
        yield process


@pytest.fixture(scope="module")
def tokenizer(served: Path) -> Any:
    return AutoTokenizer.from_pretrained(served / CHECKPOINT)


@pytest.fixture(scope="module")
def greedy(served: Path, tokenizer: Any) -> Greedy:
    """Greedy tokens of the pruned model in torch, of those that have a text."""
    model = AutoModelForCausalLM.from_pretrained(served / CHECKPOINT, dtype=torch.float32).eval()

    def run(prompt: str, count: int) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        without_text = list(range(VOCABULARY, EMBEDDED))
        output = model.generate(**ids, max_new_tokens=count, do_sample=False, suppress_tokens=without_text)
        return output[0, ids["input_ids"].shape[1] :].tolist()

    return run


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# --- text ---


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_torch(client: OpenAI, tokenizer: Any, greedy: Greedy, prompt: str) -> None:
    reply = complete(client, prompt, max_tokens=40)
    assert reply.choices[0].text == text_of(tokenizer, greedy(prompt, 40))
    assert reply.choices[0].finish_reason == "length"
    count = len(tokenizer(prompt)["input_ids"])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (count, 40)
    assert reply.usage.total_tokens == count + 40


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_brings_the_same_text_in_pieces(client: OpenAI, prompt: str) -> None:
    whole = complete(client, prompt, max_tokens=40)
    chunks = list(
        complete(client, prompt, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 20


def test_prompts_as_tokens_and_in_lists_are_each_answered(client: OpenAI, tokenizer: Any) -> None:
    texts = [complete(client, prompt, max_tokens=8).choices[0].text for prompt in PROMPTS[:3]]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    for prompts in (PROMPTS[:3], ids):
        reply = complete(client, prompts, max_tokens=8)
        assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate(texts))
    assert complete(client, ids[0], max_tokens=8).choices[0].text == texts[0]
    streamed = ["", "", ""]
    for chunk in complete(client, PROMPTS[:3], max_tokens=8, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_chat_is_the_models_template_completed(client: OpenAI, tokenizer: Any, greedy: Greedy) -> None:
    rendered = "system: Be brief.\nuser: Hello\nassistant:"
    expected = text_of(tokenizer, greedy(rendered, 20))
    reply = chat(client, ("system", "Be brief."), ("user", "Hello"))
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == expected
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chunks = list(chat(client, ("developer", "Be brief."), ("user", parts), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_next_turn_of_a_chat_does_not_read_the_first_again(
    client: OpenAI, tokenizer: Any, greedy: Greedy
) -> None:
    prompt = tokenizer("a chat that goes on")["input_ids"]
    first = complete(client, prompt, max_tokens=10)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    tokens = greedy("a chat that goes on", 30)
    longer = prompt + tokens[:10]
    second = complete(client, longer, max_tokens=20)
    assert second.usage.prompt_tokens_details.cached_tokens == len(longer) - 1
    # Ten tokens may end within a character; its other bytes are no text of their own.
    expected = text_of(tokenizer, tokens[10:])
    assert second.choices[0].text.lstrip("\ufffd") == expected.lstrip("\ufffd")
    assert complete(client, prompt, max_tokens=10).choices[0].text == first.choices[0].text


def test_a_stop_string_ends_the_text_before_it(client: OpenAI) -> None:
    text = complete(client, PROMPTS[0], max_tokens=40).choices[0].text
    stop = text[15:19]
    expected = text[: text.index(stop)]
    reply = complete(client, PROMPTS[0], max_tokens=40, stop=["never to be seen", stop])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected, "stop")
    assert reply.usage.completion_tokens < 40
    chunks = list(complete(client, PROMPTS[0], max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_reply_whose_length_is_not_asked_for_fits(client: OpenAI) -> None:
    assert complete(client, "import").usage.completion_tokens == 16
    nearly_full = [1] * (POSITIONS - 5)
    assert complete(client, nearly_full).usage.completion_tokens == 5
    assert complete(client, [[1, 2], nearly_full]).usage.completion_tokens == 21
    for prompt, options in ((nearly_full, {"max_tokens": 6}), ([1] * POSITIONS, {})):
        with pytest.raises(openai.BadRequestError, match=r"the context has 4096 tokens; .* do not fit"):
            complete(client, prompt, **options)


def test_a_seed_repeats_a_sampled_text(client: OpenAI) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.9}
    texts = [complete(client, seed=seed, **options).choices[0].text for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert (
        complete(client, temperature=1.0, top_p=0, max_tokens=30).choices[0].text
        == complete(client, max_tokens=30).choices[0].text
    )


def test_several_choices_are_as_those_of_several_requests(client: OpenAI, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    alone = [complete(client, p, seed=s, **options).choices[0].text for p in PROMPTS[:2] for s in (7, 8, 9)]
    assert len(set(alone)) == 6
    reply = complete(client, PROMPTS[:2], n=3, seed=7, **options)
    assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate(alone))
    count = sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[:2])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (count, 72)
    assert reply.usage.prompt_tokens_details.cached_tokens < count
    said = chat(client, ("user", "Hello"), n=2).choices
    streamed = ["", ""]
    for chunk in chat(client, ("user", "Hello"), n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in said]
    assert streamed[0] == streamed[1] != ""


def likelihoods(served: Path, ids: list[int], new: list[int]) -> torch.Tensor:
    """Logarithms of what torch gives each token that has a text, in the place of each new one."""
    model = torch_model(served / CHECKPOINT)
    with torch.inference_mode():
        logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1, :VOCABULARY]
    return logits.log_softmax(-1)


def test_likelihoods_of_a_completion_are_those_of_torch(
    client: OpenAI, served: Path, tokenizer: Any, greedy: Greedy
) -> None:
    tokens = greedy(PROMPTS[0], 20)
    expected = likelihoods(served, tokenizer(PROMPTS[0])["input_ids"], tokens)
    # What is sampled from is not what is told.
    options = {"max_tokens": 20, "temperature": 1.5, "top_p": 0}
    choice = complete(client, PROMPTS[0], logprobs=3, **options).choices[0]
    assert choice.text == text_of(tokenizer, tokens)
    found = choice.logprobs
    assert found.tokens == [tokenizer.decode(token) for token in tokens]
    torch.testing.assert_close(
        torch.tensor(found.token_logprobs), expected.max(-1).values, rtol=1e-4, atol=1e-4
    )
    for likeliest, row in zip(found.top_logprobs, expected, strict=True):
        assert max(likeliest.values()) == pytest.approx(float(row.max()), rel=1e-4)
        assert 1 <= len(likeliest) <= 3
    starts = [len(tokenizer.decode(tokens[:count]).rstrip("\ufffd")) for count in range(20)]
    assert found.text_offset == starts
    chunks = list(complete(client, PROMPTS[0], logprobs=3, stream=True, **options))
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in streamed for value in getattr(part, name)] == getattr(found, name)
    assert complete(client, PROMPTS[0], max_tokens=2).choices[0].logprobs is None
    assert complete(client, PROMPTS[0], max_tokens=2, logprobs=0).choices[0].logprobs.top_logprobs == [{}, {}]


def test_likelihoods_of_a_chat_are_those_of_torch(
    client: OpenAI, served: Path, tokenizer: Any, greedy: Greedy
) -> None:
    rendered = "user: Grüße\nassistant:"
    tokens = greedy(rendered, 20)
    expected = likelihoods(served, tokenizer(rendered)["input_ids"], tokens)
    found = chat(client, ("user", "Grüße"), logprobs=True, top_logprobs=2).choices[0].logprobs.content
    for entry, token, row in zip(found, tokens, expected, strict=True):
        text = tokenizer.decode(token)
        assert (entry.token, entry.bytes) == (text, None if "\ufffd" in text else list(text.encode()))
        assert entry.logprob == pytest.approx(float(row[token]), rel=1e-4, abs=1e-4)
        best = row.topk(2)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )
    chunks = list(chat(client, ("user", "Grüße"), logprobs=True, top_logprobs=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [entry for part in parts if part for entry in part.content] == found
    for options in ({}, {"logprobs": False}):
        with pytest.raises(openai.BadRequestError, match="top_logprobs: needs logprobs to be true"):
            chat(client, ("user", "Hello"), top_logprobs=2, **options)
    assert chat(client, ("user", "Hello"), top_logprobs=0, logprobs=False).choices[0].logprobs is None


def test_requests_at_once_are_answered_as_if_alone(client: OpenAI) -> None:
    alone = [complete(client, prompt, max_tokens=25).choices[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=25), PROMPTS * 2))
    assert [reply.choices[0].text for reply in together] == alone * 2


def test_deepsparse_says_what_torch_says(
    deepsparse_server: ServerProcess, tokenizer: Any, greedy: Greedy
) -> None:
    client = deepsparse_server.client
    for prompt in (PROMPTS[3], "a prompt that is longer than one step of the engine " * 3):
        tokens = greedy(prompt, 24)
        reply = complete(client, prompt, max_tokens=12)
        assert reply.choices[0].text == text_of(tokenizer, tokens[:12])
        longer = tokenizer(prompt)["input_ids"] + tokens[:12]
        reply = complete(client, longer, max_tokens=12)
        # A character that the prompt leaves incomplete belongs to the reply.
        before = text_of(tokenizer, longer).rstrip("\ufffd")
        assert before + reply.choices[0].text == text_of(tokenizer, longer + tokens[12:])
        assert reply.usage.prompt_tokens_details.cached_tokens == len(longer) - 1


@pytest.fixture
def ending(served: Path, tmp_path: Path, greedy: Greedy) -> tuple[Path, list[int]]:
    """The artifact with an end token, the first new one of its greedy text, and without a chat template."""
    folder = tmp_path / NAME
    shutil.copytree(served, folder)
    tokens = greedy(PROMPTS[0], 40)
    place = next(i for i in range(3, 40) if tokens[i] not in tokens[:i])
    graph = folder / "onnxruntime"
    (graph / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, tokens[place]]}))
    settings = json.loads((graph / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (graph / "tokenizer_config.json").write_text(json.dumps(settings))
    (graph / "chat_template.jinja").unlink(missing_ok=True)
    sealed(folder, read_manifest(folder).exports)
    return folder, tokens[:place]


def test_an_end_token_ends_a_text(ending: tuple[Path, list[int]], tokenizer: Any) -> None:
    folder, tokens = ending
    with serving(folder, cores=1) as server:
        reply = complete(server.client, PROMPTS[0], max_tokens=40)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text_of(tokenizer, tokens), "stop")
        assert reply.usage.completion_tokens == len(tokens) + 1
        chunks = list(complete(server.client, PROMPTS[0], max_tokens=40, stream=True))
        assert chunks[-1].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
            chat(server.client, ("user", "Hello"))


# --- clients that leave, and too many of them ---


def test_a_client_that_leaves_a_stream_ends_the_generation(server: ServerProcess, client: OpenAI) -> None:
    before = server.health["generated_tokens"]
    with complete(client, max_tokens=ENDLESS, stream=True) as stream:
        for _ in range(3):
            next(iter(stream))
    complete(client, max_tokens=1)  # has its turn when the first has ended
    assert server.health["generated_tokens"] - before < ENDLESS / 2


def test_a_client_that_leaves_before_its_answer_ends_the_generation(
    server: ServerProcess, client: OpenAI
) -> None:
    before = server.health["generated_tokens"]
    with pytest.raises(openai.APITimeoutError):
        complete(client, max_tokens=ENDLESS, timeout=0.3)
    complete(client, max_tokens=1)
    assert server.health["generated_tokens"] - before < ENDLESS / 2


def test_deepsparse_goes_on_when_clients_leave(
    deepsparse_server: ServerProcess, tokenizer: Any, greedy: Greedy
) -> None:
    client, most = deepsparse_server.client, 1900
    before = deepsparse_server.health["generated_tokens"]
    with complete(client, max_tokens=most, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        complete(client, "another prompt", max_tokens=most, timeout=0.3)
    # What the two left in the engine's cache is not mixed with the next text.
    reply = complete(client, PROMPTS[0], max_tokens=12)
    assert reply.choices[0].text == text_of(tokenizer, greedy(PROMPTS[0], 12))
    assert deepsparse_server.health["generated_tokens"] - before < most


def test_one_client_too_many_is_told_and_those_that_wait_are_answered(
    server: ServerProcess, client: OpenAI
) -> None:
    with ThreadPoolExecutor(33) as pool, httpx.Client(timeout=60) as http:
        with server.held():
            body = {"model": NAME, "prompt": "x", "max_tokens": 1}
            present = [pool.submit(complete, client, max_tokens=1, timeout=200) for _ in range(33)]
            wait_until(lambda: server.health["waiting"] == 32)
            for stream in (False, True):
                refused = http.post(f"{server.url}/completions", json=body | {"stream": stream})
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert refused.headers["retry-after"] == "1"
            with pytest.raises(openai.RateLimitError):
                complete(client, max_tokens=1)
        for future in present:
            assert future.result().usage.completion_tokens == 1
    wait_until(lambda: server.health["waiting"] == 0)


def test_a_client_that_does_not_read_does_not_keep_the_engine(server: ServerProcess, client: OpenAI) -> None:
    body = json.dumps({"model": NAME, "prompt": ["x"] * 64, "max_tokens": ENDLESS, "stream": True})
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # soon full
        connection.connect(("127.0.0.1", httpx.URL(server.url).port))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert connection.recv(1)
        assert complete(client, max_tokens=1, timeout=200).usage.completion_tokens == 1


def test_all_prompts_of_a_request_have_one_turn(server: ServerProcess, client: OpenAI) -> None:
    """The place of one that had a turn for each would be taken when it came back for the second."""

    def ends() -> list[str]:
        chunks = complete(client, PROMPTS[:3], max_tokens=20, stream=True, timeout=200)
        return [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]

    with ThreadPoolExecutor(33) as pool:
        with server.held():
            running = pool.submit(ends)
            waiting = [pool.submit(complete, client, max_tokens=1, timeout=200) for _ in range(32)]
            wait_until(lambda: server.health["waiting"] == 32)
        assert running.result() == ["length"] * 3
        for future in waiting:
            assert future.result().usage.completion_tokens == 1


def test_a_client_that_leaves_the_queue_frees_its_place(server: ServerProcess, client: OpenAI) -> None:
    running = complete(client, max_tokens=ENDLESS, stream=True)
    next(iter(running))
    with server.held():
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                complete(client, max_tokens=1, timeout=0.3, stream=stream)
        wait_until(lambda: server.health["waiting"] == 0)
    running.close()
    assert complete(client, max_tokens=1).usage.completion_tokens == 1
