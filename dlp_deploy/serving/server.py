"""The server process: its address, its signals, and uvicorn around the app."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..bench.worker import EngineWorker, WorkerError
from ..errors import UserError, first_line
from ..progress import say
from .app import Served, create_app
from .codec import Codec
from .decoding import CachedEngine, Generator

# Requests that may wait for the engine; one more is told to try again (status 429).
WAITING = 32
# What a stopped server gives the replies that are being written.
GRACE_S = 10
# Small, so that a client who does not read is noticed soon: a reply is a few hundred bytes per token.
SEND_BUFFER = 2**16
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1", "[::1]")


@contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, which refuses clients until `listen` is called on it.

    Raises UserError when the address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: ports are 1 to 65535, and 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"cannot serve at {host}:{port} ({reason}); give another --host or --port") from None
    with listener:
        yield listener


def run(
    worker: EngineWorker,
    listener: socket.socket,
    host: str,
    name: str,
    codec: Codec,
    context: int,
    prompt_step: int,
) -> None:
    """Answer requests. Raises KeyboardInterrupt after a signal, and WorkerError once the engine is dead.

    `host` is what the user calls the listener's address; `context` is what the worker's cache holds,
    `prompt_step` the tokens it reads at once.
    """
    deaths: list[WorkerError] = []

    def lost(error: WorkerError) -> None:
        deaths.append(error)
        server.should_exit = True

    engine = CachedEngine(worker)
    generator = Generator(engine, codec.decode, codec.ends, codec.vocabulary, prompt_step, WAITING, lost)
    app = create_app(Served(name, int(time.time()), context, codec, generator))
    _keep_to_this_machine(app, listener, host)
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=GRACE_S)
    server = uvicorn.Server(config)
    threading.Thread(target=_watch, args=(worker.pid, generator), daemon=True).start()
    listener.listen()
    say(f"Serving {name} at {_url(listener)}/v1 (Ctrl-C ends it)")
    try:
        server.run(sockets=[listener])
    finally:
        generator.close()
    if deaths:
        raise deaths[0]


def _watch(process: int, generator: Generator) -> None:
    """Wait for the end of a worker, which may come while nothing is asked of it."""
    with suppress(ChildProcessError):  # whoever waited for it first knows already
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        generator.find_out()


def _keep_to_this_machine(app: FastAPI, listener: socket.socket, host: str) -> None:
    """On loopback, refuse names that nobody gave this host: web pages reach local servers by such names."""
    address = listener.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        given = (f"[{name}]" if ":" in name else name.lower() for name in (host, address))
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK_NAMES, *given])
    else:
        say(f"{_url(listener)} is open to the network, without a password")


def _url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
