"""The doctor finds what is there and what is missing, and never falls ill itself."""

from __future__ import annotations

import http.server
import io
import platform
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from dlp_deploy.bench.machine import describe_machine
from dlp_deploy.doctor import Check, doctor, print_checks

from .test_bench_machine import server as two_sockets

# The discard port: nothing listens there.
NOWHERE = "http://127.0.0.1:9"


def named(checks: Sequence[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def web() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/" else 503)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_this_machine_is_described() -> None:
    checks = doctor(hub=NOWHERE)
    machine = describe_machine()
    assert named(checks, "Python").value == platform.python_version()
    assert named(checks, "processor").value == machine.cpu
    assert named(checks, "cores").value.startswith(f"{machine.physical_cores} physical")
    assert "GB" in named(checks, "memory").value
    assert "GB free" in named(checks, "disk (cache)").value
    for library in ("torch", "transformers", "onnxruntime"):
        assert named(checks, library).state == "ok"
    assert (
        "not open source" in named(checks, "engine deepsparse").value
        or named(checks, "engine deepsparse").advice
    )


def test_another_machine_is_described(tmp_path: Path) -> None:
    checks = doctor(root=two_sockets(tmp_path), hub=NOWHERE)
    assert named(checks, "vector instructions").state == "ok"
    assert named(checks, "cores").value.startswith("8 physical, 16 logical")


def test_a_processor_without_avx2_is_missing_it(tmp_path: Path) -> None:
    checks = doctor(root=two_sockets(tmp_path, flags="fpu sse4_2"), hub=NOWHERE)
    assert named(checks, "vector instructions").state == "missing"


def test_without_vnni_int8_gains_less(tmp_path: Path) -> None:
    check = named(doctor(root=two_sockets(tmp_path, flags="fpu avx2"), hub=NOWHERE), "vector instructions")
    assert (check.state, check.value) == ("note", "avx2")
    assert "int8" in check.advice


def test_a_missing_engine_comes_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check = named(doctor(hub=NOWHERE), "engine deepsparse")
    assert check.state == "missing"
    assert "dlp-deploy engine install deepsparse" in check.advice


def test_being_offline_is_no_error(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(doctor(hub=web), "hub").state == "ok"
    assert named(doctor(hub=f"{web}/closed"), "hub").value.endswith("status 503")
    for address in (NOWHERE, "no address"):
        check = named(doctor(hub=address), "hub")
        assert check.state == "note"
        assert "--calib builtin" in check.advice
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in named(doctor(hub=web), "hub").value


def test_the_table_shows_every_check_as_it_is() -> None:
    checks = (
        Check("disk [here]", "ok", "5 GB free at /mnt/[bold]"),
        Check("torch", "missing", "", "pip install torch"),
    )
    stream = io.StringIO()
    print_checks(checks, Console(file=stream))
    assert "/mnt/[bold]" in stream.getvalue()
    assert "pip install torch" in stream.getvalue()
