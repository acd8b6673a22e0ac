"""The server's own life: engines that fail and die, signals, and what is never served."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import openai
import pytest
from transformers import AutoTokenizer

from dlp_deploy.artifact import read_manifest
from dlp_deploy.errors import UserError
from dlp_deploy.serving import serve

from .artifacts import sealed
from .servers import (
    EMBEDDED,
    NAME,
    POSITIONS,
    ServerProcess,
    chat,
    complete,
    is_gone,
    serving,
    wait_until,
)

# Tokens of the faulty artifact: one whose embedding is no number, one that its config has but its graph
# does not, and one that its tokenizer alone has.
POISON, ABSENT, UNKNOWN = 300, EMBEDDED + 2, EMBEDDED + 9


# --- an engine that fails for one request ---


@pytest.fixture(scope="module")
def faulty(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("faulty") / NAME
    shutil.copytree(served, folder)
    graph = folder / "onnxruntime"
    poison(graph / "model.onnx", POISON)
    config = json.loads((graph / "config.json").read_text())
    (graph / "config.json").write_text(json.dumps(config | {"vocab_size": ABSENT + 1}))
    tokenizer = AutoTokenizer.from_pretrained(graph)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(len(tokenizer), UNKNOWN + 1)])
    tokenizer.save_pretrained(graph)
    sealed(folder, read_manifest(folder).exports)
    with serving(folder, precision="fp32") as server:
        yield server


def poison(model: Path, token: int) -> None:
    """Make the embedding of `token` no number."""
    stored = onnx.load(str(model), load_external_data=False).graph.initializer
    (table,) = [entry for entry in stored if "embed" in entry.name and entry.dims[0] == EMBEDDED]
    place = {entry.key: entry.value for entry in table.external_data}
    data = np.memmap(model.parent / place["location"], dtype="<f4", mode="r+", offset=int(place["offset"]))
    width = table.dims[1]
    data[token * width : (token + 1) * width] = np.nan
    data.flush()


def test_a_token_without_an_embedding_is_refused(faulty: ServerProcess) -> None:
    wrong = f"token {UNKNOWN} is not in the model's vocabulary of {ABSENT + 1}"
    for prompt in (f"a <extra {UNKNOWN}>", [1, UNKNOWN], ["a", f"<extra {UNKNOWN}>"]):
        with pytest.raises(openai.BadRequestError, match=wrong) as raised:
            complete(faulty.client, prompt)
        assert raised.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match=wrong) as raised:
        chat(faulty.client, ("user", f"a <extra {UNKNOWN}>"))
    assert raised.value.param == "messages"


@pytest.mark.parametrize(("token", "why"), [(ABSENT, "onnxruntime .extend.: "), (POISON, "not finite")])
def test_a_request_that_the_engine_cannot_answer_is_the_only_one(
    faulty: ServerProcess, token: int, why: str
) -> None:
    expected = complete(faulty.client, [1, 2, 3], max_tokens=8).choices[0].text
    for stream in (False, True):
        # The first of them leaves half of a prompt in the cache.
        for prompt in ([1, 2, 3] * 30 + [token], [[1, 2, 3], [1, token]]):
            with pytest.raises(openai.APIError, match=f"the engine cannot answer this: .*{why}") as raised:
                list(complete(faulty.client, prompt, max_tokens=8, stream=stream))
            assert raised.value.code == "engine_fault"
            assert complete(faulty.client, [1, 2, 3], max_tokens=8).choices[0].text == expected
    assert faulty.health["waiting"] == 0


def test_a_stream_that_fails_ends_with_an_error_event(faulty: ServerProcess) -> None:
    body = {"model": NAME, "prompt": [[1, 2, 3], [POISON]], "temperature": 0, "max_tokens": 8, "stream": True}
    reply = httpx.post(f"{faulty.url}/completions", json=body, timeout=60)
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, last = map(json.loads, lines[:-1])
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["error"]["type"] == "server_error"


# --- an engine that dies ---


def test_a_dead_engine_is_told_to_all_who_wait_and_ends_the_server(served: Path) -> None:
    with serving(served, context=POSITIONS) as server:
        client = server.client
        stream = complete(client, max_tokens=4000, stream=True)
        next(iter(stream))
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(complete, client, stream=number % 2 == 1) for number in range(4)]
            wait_until(lambda: server.health["waiting"] == 4)
            server.worker.kill()
            with pytest.raises(openai.APIError, match=r"the engine failed: .*SIGKILL.*; the server ends"):
                list(stream)
            for future in waiting:
                with pytest.raises(openai.InternalServerError, match=r"the engine failed: .*SIGKILL"):
                    future.result()
        assert server.process.wait(timeout=60) == 1
    # Where the stream that nobody reads is full, nothing is asked of the engine when it dies.
    said_last(server, r"dlp-deploy: onnxruntime \((extend|restart)\) was ended by SIGKILL.*")


def test_an_engine_that_dies_unasked_ends_the_server(served: Path) -> None:
    with serving(served) as server:
        assert complete(server.client, max_tokens=1).usage.completion_tokens == 1
        server.worker.kill()
        assert server.process.wait(timeout=60) == 1
    said_last(server, r"dlp-deploy: onnxruntime \(restart\) was ended by SIGKILL.*")


def said_last(server: ServerProcess, words: str) -> None:
    """Check the one line that the server has written since it served."""
    wait_until(lambda: len(server.lines) > 1 and "Serving " in server.lines[-2])
    assert re.fullmatch(words, server.lines[-1].rstrip()), server.lines


# --- signals ---


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_server_ends_its_streams_and_leaves_no_worker(served: Path, how: signal.Signals) -> None:
    with serving(served, engine="onnxruntime", precision="int8", context=64) as server:
        client, worker = server.client, server.worker
        with pytest.raises(openai.BadRequestError, match="the context has 64 tokens"):
            complete(client, max_tokens=64)
        stream = complete(client, max_tokens=60, stream=True)
        next(iter(stream))
        assert server.stop(how) == 0
        assert "".join(chunk.choices[0].text for chunk in stream)
        wait_until(lambda: is_gone(worker))


def test_a_server_can_be_stopped_while_it_loads(served: Path) -> None:
    with serving(served, marker="Loading ") as server:
        worker = server.worker
        assert server.stop() == 0
        wait_until(lambda: is_gone(worker))


def test_a_server_whose_engine_hangs_can_be_stopped(served: Path) -> None:
    with serving(served) as server:
        worker = server.worker
        worker.suspend()
        with pytest.raises(openai.APITimeoutError):
            complete(server.client, timeout=1)
        assert server.stop() == 0
        wait_until(lambda: is_gone(worker))


# --- what is not served at all ---


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
    served: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        serve(served, **arguments)


def test_a_port_in_use_and_an_altered_artifact_are_refused(served: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve at 127.0.0.1:{port} .*in use.* --port"):
            serve(served, port=port)
    with pytest.raises(UserError, match="is no artifact"):
        serve(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(served, copy)
    data = copy / "onnxruntime" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match="was altered after export"):
        serve(copy)
