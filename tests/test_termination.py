"""Processes that are told to end, or killed: what they leave behind, and how they say so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dlp_deploy

from .servers import is_gone, wait_until, workers_of

# An engine that says in a file that it computes, and never ends.
ENDLESS = """
from pathlib import Path

class Session:
    def __init__(self, threads):
        self.versions = {}

    def load(self, model, context, prompt, fill):
        Path(model).touch()
        while True:
            pass
"""
CLIENT = """
import sys
from pathlib import Path
from dlp_deploy.bench.engines import Engine
from dlp_deploy.bench.worker import EngineWorker

worker, model, core = sys.argv[1:]
engine = Engine("endless", "Endless 1.0", worker, "endless", ("fp32",), "Apache-2.0", ("numpy",))
EngineWorker.spawn(engine, [int(core)]).load(Path(model), context=8, prompt=4)
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes that the test starts have their temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_a_command_that_is_told_to_end_leaves_no_worker_and_no_temporary_files(
    tiny_artifact: Path, scratch: Path
) -> None:
    program = str(Path(sys.executable).with_name("dlp-deploy"))
    command = [program, "eval", str(tiny_artifact), "--engine", "onnxruntime", "--data", "builtin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: bool(workers_of(process.pid)))
        (worker,) = workers_of(process.pid)
        # So that it is there when the signal comes.
        worker.suspend()
        assert list(scratch.glob("dlp-deploy-*"))
        process.terminate()
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGTERM, b"")
    assert error.decode().splitlines()[-1] == "dlp-deploy: ended by SIGTERM"
    assert is_gone(worker)
    assert not list(scratch.glob("dlp-deploy-*"))


def test_a_worker_that_computes_ends_with_a_client_that_is_killed(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    model, core = tmp_path / "computing", str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "-c", CLIENT, str(tmp_path / "endless.py"), str(model), core]
    with subprocess.Popen(command) as process:
        wait_until(lambda: model.exists() or process.poll() is not None)
        (worker,) = workers_of(process.pid)
        assert list(scratch.glob("dlp-deploy-*"))
        process.kill()
    wait_until(lambda: is_gone(worker))
    assert not list(scratch.glob("dlp-deploy-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_is_its_exit_status(
    number: signal.Signals, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(**options: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(dlp_deploy, "prune", told)
    # The tests themselves may have been started by nohup.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        status, out, error = run("prune", "--model", "m")
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (status, out) == (128 + number, "")
    assert error.startswith(f"dlp-deploy: ended by {number.name}; what is finished is kept, and --resume")


def test_a_second_signal_does_not_stop_the_cleaning(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cleaned = []

    def told(**options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    monkeypatch.setattr(dlp_deploy, "prune", told)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert run("prune", "--model", "m")[0] == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleaned == [True]


def test_a_closed_terminal_does_not_end_what_nohup_started(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dlp_deploy, "prune", lambda **options: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("prune", "--model", "m")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)
