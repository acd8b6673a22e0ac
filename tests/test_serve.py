"""The server, asked by the real client: right text, right errors, and nothing left running."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from openai import OpenAI
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dlp_deploy.artifact import CHECKPOINT, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.errors import UserError
from dlp_deploy.serving import serve

from .artifacts import pruned, sealed, with_graphs
from .servers import ServerProcess, serving
from .tiny_models import SIZES, save_tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
POSITIONS = 4096
PROMPTS = ["def main():", "The quick brown fox", "import", "Grüße, 世界 😀", "a = [1, 2, 3]", "x" * 300]
NAME = "tiny-dlp-s70"
# More than any test waits for.
ENDLESS = POSITIONS - 400
Greedy = Callable[[str, int], list[int]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A pruned and exported llama that chats, and whose greedy text never ends."""
    folder = tmp_path_factory.mktemp("served")
    tiny_tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", chat_template=TEMPLATE)
    config = LlamaConfig(**SIZES | {"max_position_embeddings": POSITIONS})
    model = save_tiny_model(folder / "model", config, tokenizer)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][config.eos_token_id] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return with_graphs(pruned(model, folder / NAME), "fp32,int8", "onnxruntime,deepsparse")


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[ServerProcess]:
    with serving(artifact=artifact, context=POSITIONS) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def tokenizer(artifact: Path) -> Any:
    return AutoTokenizer.from_pretrained(artifact / CHECKPOINT)


@pytest.fixture(scope="module")
def greedy(artifact: Path, tokenizer: Any) -> Greedy:
    """Greedy tokens of the pruned model in torch."""
    model = AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT, dtype=torch.float32).eval()

    def run(prompt: str, count: int) -> list[int]:
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**ids, max_new_tokens=count, do_sample=False)
        return output[0, ids["input_ids"].shape[1] :].tolist()

    return run


def text_of(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def complete(client: OpenAI, prompt: Any = "import", **options: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": prompt, "temperature": 0} | options)


def chat(client: OpenAI, *messages: tuple[str, Any], **options: Any) -> Any:
    listed = [{"role": role, "content": content} for role, content in messages]
    defaults = {"model": NAME, "messages": listed, "temperature": 0, "max_tokens": 20}
    return client.chat.completions.create(**defaults | options)


def health(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(server.url.removesuffix("/v1") + "/health").json()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_a_seed_repeats_a_sampled_text(client: OpenAI) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "top_p": 0.9}
    texts = [complete(client, seed=seed, **options).choices[0].text for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert (
        complete(client, temperature=1.0, top_p=0, max_tokens=30).choices[0].text
        == complete(client, max_tokens=30).choices[0].text
    )


def test_requests_at_once_are_answered_as_if_alone(client: OpenAI) -> None:
    alone = [complete(client, prompt, max_tokens=25).choices[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: complete(client, prompt, max_tokens=25), PROMPTS * 2))
    assert [reply.choices[0].text for reply in together] == alone * 2


def test_deepsparse_says_what_torch_says(artifact: Path, tokenizer: Any, greedy: Greedy) -> None:
    install("deepsparse")
    with serving(artifact=artifact, engine="deepsparse", context=160) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
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


# --- clients that leave, and too many of them ---


def test_a_client_that_leaves_a_stream_ends_the_generation(server: ServerProcess, client: OpenAI) -> None:
    before = health(server)["generated_tokens"]
    with complete(client, max_tokens=ENDLESS, stream=True) as stream:
        for _ in range(3):
            next(iter(stream))
    complete(client, max_tokens=1)  # has its turn when the first has ended
    assert health(server)["generated_tokens"] - before < ENDLESS / 2


def test_a_client_that_leaves_before_its_answer_ends_the_generation(
    server: ServerProcess, client: OpenAI
) -> None:
    before = health(server)["generated_tokens"]
    with pytest.raises(openai.APITimeoutError):
        complete(client, max_tokens=ENDLESS, timeout=0.3)
    complete(client, max_tokens=1)
    assert health(server)["generated_tokens"] - before < ENDLESS / 2


def test_clients_that_wait_may_leave_and_one_too_many_is_told(server: ServerProcess, client: OpenAI) -> None:
    running = complete(client, max_tokens=ENDLESS, stream=True)
    next(iter(running))
    with ThreadPoolExecutor(32) as pool, httpx.Client(timeout=60) as http:
        body = {"model": NAME, "prompt": "x", "max_tokens": 1}
        waiting = [pool.submit(complete, client, max_tokens=1, timeout=3) for _ in range(32)]
        wait_until(lambda: health(server)["waiting"] == 32)
        for stream in (False, True):
            refused = http.post(f"{server.url}/completions", json=body | {"stream": stream})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            complete(client, max_tokens=1)
        running.close()
        for future in waiting:
            assert future.result().usage.completion_tokens == 1
    assert health(server)["waiting"] == 0


def test_a_client_that_leaves_the_queue_frees_its_place(server: ServerProcess, client: OpenAI) -> None:
    running = complete(client, max_tokens=ENDLESS, stream=True)
    next(iter(running))
    for stream in (False, True):
        with pytest.raises(openai.APITimeoutError):
            complete(client, max_tokens=1, timeout=0.3, stream=stream)
    wait_until(lambda: health(server)["waiting"] == 0)
    running.close()
    assert complete(client, max_tokens=1).usage.completion_tokens == 1


# --- errors, as OpenAI words them ---


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
        ({"n": 2}, "n", "not supported"),
        ({"logprobs": 0}, "logprobs", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": [1, 100_000]}, "prompt", "token 100000 is not in the model's vocabulary of 512"),
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
    assert complete(client, max_tokens=2, stop=None, **neutral).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages: .*at least 1 item"),
        ([("robot", "x")], "messages.0.role"),
        ([("user", None)], "messages.0.content"),
        ([("user", [{"type": "image_url", "image_url": {"url": "x"}}])], "messages.0.content.0.type"),
        ([("tool", "x")], "chat template: no tools here"),
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


# --- the server's own life ---


@pytest.fixture
def ending(artifact: Path, tmp_path: Path, greedy: Greedy) -> tuple[Path, list[int]]:
    """The artifact with an end token, the first new one of its greedy text, and without a chat template."""
    folder = tmp_path / NAME
    shutil.copytree(artifact, folder)
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


def test_an_end_token_ends_a_text_and_a_dead_engine_ends_the_server(
    ending: tuple[Path, list[int]], tokenizer: Any
) -> None:
    folder, tokens = ending
    with serving(artifact=folder, cores=1) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        reply = complete(client, PROMPTS[0], max_tokens=40)
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text_of(tokenizer, tokens), "stop")
        assert reply.usage.completion_tokens == len(tokens) + 1
        with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
            chat(client, ("user", "Hello"))
        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()
        with pytest.raises(openai.InternalServerError, match=r"the engine failed: .*SIGKILL"):
            complete(client)
        assert server.process.wait(timeout=60) == 1
    assert any("WorkerError" in line for line in server.lines)


def test_a_stopped_server_leaves_no_worker_and_frees_its_port(artifact: Path) -> None:
    with serving(artifact=artifact, precision="int8", context=64) as server:
        client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="the context has 64 tokens"):
            complete(client, max_tokens=64)
        stream = complete(client, max_tokens=60, stream=True)
        children = psutil.Process(server.process.pid).children()
        assert "".join(chunk.choices[0].text for chunk in stream)
        assert server.stop() == 0
        assert children
        assert not any(child.is_running() for child in children)
        with socket.create_server(("127.0.0.1", httpx.URL(server.url).port)):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "tensorrt"}, "there is no engine 'tensorrt'"),
        ({"engine": "torch"}, "has no sparse graph for torch; it has: onnxruntime fp32, onnxruntime int8"),
        ({"precision": "int4"}, "has no sparse graph for onnxruntime int4"),
        ({"cores": 1000}, "--cores 1000"),
        ({"cores": 0}, "--cores 0"),
        ({"context": POSITIONS + 1}, "--context 4097: this model takes 2 to 4096 tokens"),
        ({"context": 1}, "--context 1"),
        ({"host": "no.such.host.invalid"}, "cannot serve at no.such.host.invalid:8000"),
        ({"port": 70000}, "--port 70000: ports are 1 to 65535"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(
    artifact: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        serve(artifact, **arguments)


def test_a_port_in_use_and_an_altered_artifact_are_refused(artifact: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve at 127.0.0.1:{port} .*in use.* --port"):
            serve(artifact, port=port)
    with pytest.raises(UserError, match="is no artifact"):
        serve(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    data = copy / "onnxruntime" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="was altered after export"):
        serve(copy)
