"""A server process to talk to, and its words on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

PROGRAM = "import json, sys; from dlp_deploy.serving import serve; serve(**json.loads(sys.argv[1]))"


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def stop(self) -> int:
        """End it as a supervisor does, and return its exit status."""
        self.process.terminate()
        return self.process.wait(timeout=60)


@contextmanager
def serving(**arguments: object) -> Iterator[ServerProcess]:
    """`dlp_deploy.serving.serve(**arguments)` in a process of its own, on a free port."""
    options = json.dumps({"port": 0, **arguments}, default=str)
    with started([sys.executable, "-c", PROGRAM, options], marker="Serving ") as server:
        server.url = next(word for line in server.lines for word in line.split() if word.startswith("http"))
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
