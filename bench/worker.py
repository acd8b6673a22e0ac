"""The bench's side of a worker process: start it, ask it, and say clearly how it died.

An engine that aborts, as DeepSparse's compiler does on what it cannot take, ends its own process and
no other; what it wrote last becomes the error.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..progress import Advance
from .engines import Engine
from .environments import engine_environment, interpreter
from .workers import __file__ as _workers_file
from .workers import frames

WORKERS = Path(_workers_file).parent
# Generous: compiling a 7B model takes minutes. A worker that is still busy after this long hangs.
TIME_LIMIT_S = 3600.0
# Bytes of a log that are looked at: an engine may have written gigabytes.
LOG_TAIL = 1 << 18
_TELLING = re.compile(r"^assertion|error\b|exception|terminate|received signal", re.IGNORECASE)


class WorkerError(RuntimeError):
    """An engine failed, died or hung. The message is one line; `log` holds its last lines."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Generation:
    """Greedy decoding of one prompt: time to the first token, time of each later one, the tokens, and
    whether all logits were finite."""

    ttft_ms: float
    samples_ms: tuple[float, ...]
    tokens: tuple[int, ...]
    finite: bool


@dataclass(frozen=True)
class Usage:
    """Resident memory (peak and present) and processor seconds of the worker process alone."""

    peak_rss_bytes: int
    rss_bytes: int
    cpu_s: float


class EngineWorker:
    """One engine in a process of its own, pinned to the cores asked for. Use as a context manager."""

    def __init__(
        self,
        engine: Engine,
        process: subprocess.Popen[bytes],
        connection: socket.socket,
        log: IO[bytes],
        scratch: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.engine = engine
        self.pid = process.pid
        self.versions: dict[str, str] = {}
        self._process, self._connection, self._log = process, connection, log
        self._scratch = scratch
        # Bytes of the log that were there at the last question.
        self._asked_at = 0

    @classmethod
    def spawn(cls, engine: Engine, cores: Sequence[int], time_limit_s: float = TIME_LIMIT_S) -> EngineWorker:
        """Start a worker. `cores` are logical CPU numbers, one thread each.

        Raises UserError when the engine is not installed, WorkerError when it does not start.
        """
        python = interpreter(engine)
        ours, theirs = socket.socketpair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        # Its temporary files are ours to remove: an engine that aborts removes nothing.
        scratch = tempfile.TemporaryDirectory(prefix="dlp-deploy-")
        command = [str(python), str(WORKERS), engine.worker, ",".join(map(str, cores)), scratch.name]
        with theirs:
            # A session of its own: Ctrl-C reaches us alone, and we close the worker.
            process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=_environment(engine, len(cores), scratch.name),
                start_new_session=True,
            )
        ours.settimeout(time_limit_s)
        worker = cls(engine, process, ours, log, scratch)
        try:
            worker.versions = worker._receive("starting")[0]["versions"]
        except BaseException:
            worker.close()
            raise
        return worker

    @property
    def time_limit_s(self) -> float:
        """How long an answer may take; a worker that takes longer is ended."""
        limit = self._connection.gettimeout()
        assert limit is not None
        return limit

    @time_limit_s.setter
    def time_limit_s(self, seconds: float) -> None:
        self._connection.settimeout(seconds)

    def load(self, model: Path, context: int, prompt: int, fill: int = 0) -> float:
        """Load a graph (or a checkpoint folder) and return the seconds it took.

        The KV cache has room for `context` tokens, and prompts are of `prompt` tokens behind `fill` others.
        With prompt 0 only `window_nll` can be asked.
        """
        body, _ = self._ask("load", model=str(model.resolve()), context=context, prompt=prompt, fill=fill)
        return float(body["load_s"])

    def restart(self) -> None:
        """Empty the KV cache."""
        self._ask("restart")

    def extend(self, ids: np.ndarray) -> np.ndarray:
        """Append ids int64 [n] to the KV cache; the logits of the last one, float32 [vocabulary]."""
        return self._ask("extend", {"ids": ids})[1]["logits"]

    def logits(self, ids: np.ndarray, prompt: int, advance: Advance | None = None) -> np.ndarray:
        """Read ids[:prompt] at once and the rest token by token through the KV cache.

        ids int64 [n] -> float32 [n - prompt + 1, vocabulary], the logits after the prompt and after
        each later token. The time limit is for each of them, as a graph that memory does not hold is read
        from disk for each; `advance` is called behind each.
        """
        self.restart()
        rows: list[np.ndarray] = []
        for start, end in zip([0, *range(prompt, len(ids))], range(prompt, len(ids) + 1), strict=True):
            rows.append(self.extend(ids[start:end]))
            if advance is not None:
                advance()
        return np.stack(rows)

    def window_nll(self, windows: np.ndarray) -> np.ndarray:
        """Negative log-likelihood in nats of each next token; int64 [n, L] -> float32 [n, L - 1]."""
        return self._ask("window_nll", {"windows": windows})[1]["nll"]

    def generate(self, ids: np.ndarray, new_tokens: int) -> Generation:
        """Greedy decoding of `new_tokens` tokens.

        The last tokens of ids int64 [n], as many as `load` was told, are the timed prompt; those
        before fill the KV cache untimed.
        """
        body, _ = self._ask("generate", {"ids": ids}, new_tokens=new_tokens)
        return Generation(body["ttft_ms"], tuple(body["samples_ms"]), tuple(body["tokens"]), body["finite"])

    def follow(self, ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The logits that `generate` would see if it chose `tokens`, int64 [n] -> float32 [n + 1,
        vocabulary]: after the prompt, and after each of them."""
        return self._ask("follow", {"ids": ids, "tokens": tokens})[1]["logits"]

    def memory(self) -> Usage:
        return Usage(**self._ask("memory")[0])

    def close(self) -> None:
        """End the worker; harmless when it is gone."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._scratch.cleanup()

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self, call: str, arrays: dict[str, np.ndarray] | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], frames.Arrays]:
        self._asked_at = self._logged()
        try:
            frames.send(self._connection, {"call": call, "arguments": arguments}, arrays)
        except TimeoutError:
            raise self._hung(call) from None
        except OSError:
            raise self._died(call) from None
        return self._receive(call)

    def _receive(self, doing: str) -> tuple[dict[str, Any], frames.Arrays]:
        try:
            body, arrays = frames.receive(self._connection)
        except TimeoutError:
            raise self._hung(doing) from None
        except (EOFError, OSError):
            raise self._died(doing) from None
        if "error" in body:
            raise WorkerError(f"{self.engine.name} ({doing}): {body['error']}", self._last_lines())
        return body, arrays

    def _hung(self, doing: str) -> WorkerError:
        limit = self.time_limit_s
        self._process.kill()
        return WorkerError(
            f"{self.engine.name} ({doing}) gave no answer for {limit:g} s and was ended{self._last_words()}",
            self._last_lines(),
        )

    def _died(self, doing: str) -> WorkerError:
        # The socket closes a moment before the process is gone.
        try:
            status = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        if status == -signal.SIGKILL:
            how += " (was there enough memory?)"
        return WorkerError(f"{self.engine.name} ({doing}) {how}{self._last_words()}", self._last_lines())

    def _logged(self) -> int:
        """Bytes of the log."""
        return os.fstat(self._log.fileno()).st_size

    def _last_lines(self, count: int = 40, start: int = 0) -> str:
        """The last lines of the log, of those behind byte `start`."""
        # Not by seek and read: the place in the file is where the worker writes on.
        tail = os.pread(self._log.fileno(), LOG_TAIL, max(start, self._logged() - LOG_TAIL))
        return "\n".join(tail.decode(errors="replace").splitlines()[-count:])

    def _last_words(self) -> str:
        """The line of the log that says most: engines print long backtraces after it. What was logged before
        the last question, of an error that was survived, counts only where there is nothing else."""
        said = self._last_lines(200, self._asked_at) or self._last_lines(200)
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        telling = [line for line in lines if _TELLING.search(line)] or lines[-1:]
        return f"; its last words: {telling[0][:300]}" if telling else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # One of the real-time signals, which have no names.
        return f"signal {number}"


def _environment(engine: Engine, threads: int, scratch: str) -> dict[str, str]:
    """Thread counts that agree with the cores, for engines that read them from variables only, and the
    folder for temporary files."""
    return {
        **engine_environment(engine),
        "TMPDIR": scratch,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
