"""Environments of engines: pinned, whole or absent, and one at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from dlp_deploy.bench import environments
from dlp_deploy.bench.engines import Engine, engine_named
from dlp_deploy.bench.environments import (
    MARKER,
    environment_folder,
    find_python,
    install,
    install_engine,
    interpreter,
    list_engines,
)
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.errors import UserError

HERE = (sys.version_info.major, sys.version_info.minor)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path: Path) -> Engine:
    """An engine that is one pure Python package, from the pins of a real one."""
    lock = engine_named("deepsparse").lock
    assert lock is not None
    (pinned,) = re.findall(r"^six==.*(?:\n    --hash=.*)+", lock.read_text(), re.MULTILINE)
    (tmp_path / "small.txt").write_text(pinned + "\n")
    return Engine(
        name="small",
        title="Small 1.0",
        worker="small",
        reads="small",
        precisions=("fp32",),
        licence="MIT",
        modules=("six",),
        lock=tmp_path / "small.txt",
        pythons=(HERE,),
    )


def test_the_lock_pins_everything_by_hash_and_names_no_index() -> None:
    lock = engine_named("deepsparse").lock
    assert lock is not None
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if "://" in line or "index" in line]
    assert all(line.startswith("    --hash=sha256:") or "==" in line for line in lines)
    names = {line.split("==")[0] for line in lines if "==" in line}
    assert {"deepsparse", "numpy", "onnx"} <= names
    assert not names & {"torch", "transformers"}


def test_deepsparse_is_installed_with_the_pinned_versions() -> None:
    python = install("deepsparse")
    assert install("deepsparse") == python == interpreter(engine_named("deepsparse"))
    (status,) = (status for status in list_engines() if status.engine.name == "deepsparse")
    assert status.python == python
    assert status.advice == ""
    versions = status.versions
    assert (versions["deepsparse"], versions["numpy"], versions["onnx"]) == ("1.8.0", "1.26.4", "1.14.1")
    assert "torch" not in versions


def test_engines_of_the_main_environment_need_no_installation() -> None:
    assert install("onnxruntime") == install("torch") == Path(sys.executable)


def test_an_engine_that_is_not_installed_names_the_command(cache: Path) -> None:
    with pytest.raises(UserError, match="dlp-deploy engine install deepsparse"):
        interpreter(engine_named("deepsparse"))
    (status,) = (status for status in list_engines() if status.engine.name == "deepsparse")
    assert status.python is None
    assert status.advice == "dlp-deploy engine install deepsparse"


def test_an_interrupted_installation_is_redone(cache: Path, small: Engine) -> None:
    folder = environment_folder(small, HERE)
    python = install_engine(small)
    assert interpreter(small) == python == folder / "bin" / "python"
    assert json.loads((folder / MARKER).read_text())["versions"]["six"]
    (folder / MARKER).unlink()
    (folder / "left-over").touch()
    with pytest.raises(UserError, match="not installed"):
        interpreter(small)
    assert install_engine(small) == python
    assert not (folder / "left-over").exists()
    subprocess.run([str(python), "-c", "import six"], check=True)


def test_an_installation_that_is_interrupted_waits_for_the_end_of_its_pip(
    cache: Path, small: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would write on into the folder that the next attempt removes."""
    started: list[subprocess.Popen[Any]] = []

    class Noted(subprocess.Popen[Any]):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            started.append(self)

    @contextmanager
    def interrupted(description: str, total: int) -> Iterator[Callable[..., None]]:
        def advance(note: str) -> None:
            raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(environments, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install_engine(small)
    # Nobody has asked since whether they have ended.
    assert "pip" in started[-1].args
    assert all(process.returncode is not None for process in started)


def test_a_python_that_makes_no_environment_is_told_in_one_line(
    cache: Path, small: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho first words >&2\necho no room for it >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(environments, "find_python", lambda engine: (broken, HERE))
    with pytest.raises(UserError, match=r"cannot make an environment in .*: no room for it$"):
        install_engine(small)
    with pytest.raises(UserError, match="not installed"):
        interpreter(small)


def test_installations_at_the_same_time_make_one_environment(cache: Path, small: Engine) -> None:
    found: list[Path] = []
    threads = [Thread(target=lambda: found.append(install_engine(small))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [environment_folder(small, HERE) / "bin" / "python"] * 3


def test_a_package_with_another_hash_is_refused(cache: Path, small: Engine) -> None:
    assert small.lock is not None
    small.lock.write_text("six==1.17.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(UserError, match="could not install small"):
        install_engine(small)
    with pytest.raises(UserError, match="not installed"):
        interpreter(small)


def test_another_lock_is_another_environment(cache: Path, small: Engine) -> None:
    before = environment_folder(small, HERE)
    assert environment_folder(small, (3, 9)) != before
    assert small.lock is not None
    small.lock.write_text(small.lock.read_text() + "# changed\n")
    assert environment_folder(small, HERE) != before


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Python but those that the test puts below the folder."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}{os.pathsep}{tmp_path / 'bin'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    return tmp_path


def test_without_a_suitable_python_it_is_said_what_to_install(elsewhere: Path) -> None:
    executable(elsewhere / "shims/python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    executable(elsewhere / "bin/python3.10", "echo 3 8")
    executable(elsewhere / "bin/python3.9", "exec cat")
    with pytest.raises(UserError, match=r"needs Python 3\.9, 3\.10, 3\.11 .*apt install python3\.11-venv"):
        find_python(engine_named("deepsparse"))


@pytest.mark.parametrize("place", ["bin", "pyenv/versions/3.10.13/bin", "uv/cpython-3.10-linux/bin"])
def test_a_shim_that_fails_is_passed_over(elsewhere: Path, place: str) -> None:
    executable(elsewhere / "shims/python3.10", "exit 127")
    executable(elsewhere / place / "python3.10", "echo 3 10")
    assert find_python(engine_named("deepsparse")) == (elsewhere / place / "python3.10", (3, 10))


def test_the_best_version_is_preferred(elsewhere: Path) -> None:
    executable(elsewhere / "bin/python3.9", "echo 3 9")
    executable(elsewhere / "uv/cpython-3.11/bin/python3.11", "echo 3 11")
    assert find_python(engine_named("deepsparse"))[1] == (3, 11)


def test_variables_that_lead_astray_are_not_passed_on(
    cache: Path, small: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "astray").mkdir()
    (tmp_path / "astray" / "six.py").write_text("raise RuntimeError('the wrong six')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "astray"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "astray"))
    python = install_engine(replace(small))
    assert list(python.parent.parent.glob("lib/python*/site-packages/six.py"))


def test_an_engine_of_the_main_environment_imports_from_where_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it needs may be in a user's own folder, or on PYTHONPATH."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module_of_the_path.py").write_text("VERSION = '1.2'")
    (tmp_path / "engine.py").write_text(
        "import os, module_of_the_path\n"
        "class Session:\n"
        "    def __init__(self, threads):\n"
        "        kept_apart = os.environ.get('PYTHONNOUSERSITE', 'no')\n"
        "        self.versions = {'module': module_of_the_path.VERSION, 'kept apart': kept_apart}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    engine = Engine("own", "Own 1.0", str(tmp_path / "engine.py"), "own", ("fp32",), "MIT", ("numpy",))
    with EngineWorker.spawn(engine, [min(os.sched_getaffinity(0))]) as worker:
        assert worker.versions == {"module": "1.2", "kept apart": "no"}
