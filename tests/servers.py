"""A model to serve, a server process to talk to, and its words on stderr."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import OpenAI
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from dlp_deploy.bench.worker import WORKERS

from .artifacts import pruned, with_graphs
from .tiny_models import SIZES, VOCABULARY, save_tiny_model

NAME = "tiny-dlp-s70"
POSITIONS = 4096
# Embeddings that the tokenizer has no token for, as in models whose vocabulary was rounded up.
EMBEDDED = VOCABULARY + 8
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% if m.content == 'one' %}{{ 1 + m.content }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def served_artifact(folder: Path, tokenizer: Any) -> Path:
    """A pruned and exported llama that chats, and whose greedy text never ends.

    Often its likeliest token is one that the tokenizer does not have.
    """
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", chat_template=TEMPLATE)
    config = LlamaConfig(**SIZES | {"max_position_embeddings": POSITIONS, "vocab_size": EMBEDDED})
    model = save_tiny_model(folder / "model", config, tokenizer)
    weights = load_file(model / "model.safetensors")
    head = weights["lm_head.weight"]
    head[config.eos_token_id] = 0
    head[VOCABULARY:] = 4 * head[40 : 40 + EMBEDDED - VOCABULARY]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return with_graphs(pruned(model, folder / NAME), "fp32,int8", "onnxruntime,deepsparse")


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    @property
    def health(self) -> dict[str, Any]:
        return httpx.get(self.url.removesuffix("/v1") + "/health").json()

    @property
    def worker(self) -> psutil.Process:
        (worker,) = workers_of(self.process.pid)
        return worker

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its engine answers nothing in the body, however long that takes."""
        worker = self.worker
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it as a supervisor does, and return its exit status."""
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


def complete(client: OpenAI, prompt: Any = "import", **options: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": prompt, "temperature": 0} | options)


def chat(client: OpenAI, *messages: tuple[str, Any], **options: Any) -> Any:
    listed = [{"role": role, "content": content} for role, content in messages]
    defaults = {"model": NAME, "messages": listed, "temperature": 0, "max_tokens": 20}
    return client.chat.completions.create(**defaults | options)


def workers_of(process: int) -> list[psutil.Process]:
    """The engines that it has started and that live."""
    found = []
    for child in psutil.Process(process).children():
        with suppress(psutil.NoSuchProcess):
            if str(WORKERS) in child.cmdline():
                found.append(child)
    return found


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, even if nobody has asked yet how."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(artifact: Path, marker: str = "Serving ", **options: object) -> Iterator[ServerProcess]:
    """`dlp-deploy serve artifact` with these options, in a process of its own, on a free port, once it has
    written a line with `marker`."""
    program = Path(sys.executable).with_name("dlp-deploy")
    listed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [str(program), "serve", str(artifact), "--port", "0", *listed]
    with started(command, marker) as server:
        words = [word for line in server.lines for word in line.split()]
        server.url = next((word for word in words if word.startswith("http")), "")
        yield server


@contextmanager
def started(
    command: Sequence[str], marker: str, env: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A process that has written a line with `marker`; it is ended behind the body."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    )
    server = ServerProcess(process)
    try:
        _read_until(server, marker)
        drain = threading.Thread(target=lambda: server.lines.extend(process.stdout or ()), daemon=True)
        drain.start()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_until(server: ServerProcess, marker: str) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip())
        if marker in line:
            return
    raise AssertionError("the server ended before it served:\n" + "\n".join(server.lines))
