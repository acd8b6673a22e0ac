"""Environments of the engines that cannot share the main one.

Each lives in the user's cache folder, keyed by its lock file and Python version, so that a changed
lock makes a new environment and an old one is never mistaken for it. A marker written last tells a
finished environment from an interrupted one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..errors import UserError
from ..progress import progress, say
from ..storage import write_json
from .engines import Engine, engine_named, engines

MARKER = "installed.json"
# Variables that would lead an environment's interpreter or its pip outside that environment.
_LEADING_ASTRAY = (
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_USER",
    "PIP_REQUIRE_VIRTUALENV",
)


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine can be used; `python` is the interpreter that runs it, None if not installed."""

    engine: Engine
    python: Path | None
    versions: Mapping[str, str]

    @property
    def advice(self) -> str:
        """The command that installs a missing engine."""
        return "" if self.python else _install_command(self.engine)


def install(name: str) -> Path:
    """Install the engine called `name` unless it is there, and return its Python interpreter.

    Raises UserError when no suitable Python is on the machine or the packages cannot be had.
    """
    return install_engine(engine_named(name))


def install_engine(engine: Engine) -> Path:
    """The same for an engine that need not be among those of this project."""
    if engine.lock is None:
        return _main_interpreter(engine)
    found = _installed_interpreter(engine)
    if found:
        return found
    python, version = find_python(engine)
    folder = environment_folder(engine, version)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        # Another process may have finished the work while this one waited.
        if not _is_complete(folder):
            _create(engine, python, folder)
    return _interpreter(folder)


def interpreter(engine: Engine) -> Path:
    """The Python that runs `engine`. Raises UserError naming the command that installs it."""
    if engine.lock is None:
        return _main_interpreter(engine)
    found = _installed_interpreter(engine)
    if found is None:
        raise UserError(f"the engine {engine.name} is not installed; run: {_install_command(engine)}")
    return found


def list_engines() -> list[EngineStatus]:
    """Every engine, and whether it is installed."""
    return [_status(engine) for engine in engines().values()]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dlp-deploy" / "engines"


def environment_folder(engine: Engine, version: tuple[int, int]) -> Path:
    """Where the environment of `engine` on Python `version` is, or would be."""
    assert engine.lock is not None
    digest = hashlib.sha256(engine.lock.read_bytes() + (engine.before.read_bytes() if engine.before else b""))
    digest.update("{}.{}".format(*version).encode())
    return cache_folder() / f"{engine.name}-{digest.hexdigest()[:16]}"


def clean_environment() -> dict[str, str]:
    """The variables to start the interpreter of an environment of its own with: ours, less what would lead it
    astray."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEADING_ASTRAY}
    return {**kept, "PYTHONNOUSERSITE": "1", "NM_DISABLE_ANALYTICS": "1"}


def engine_environment(engine: Engine) -> dict[str, str]:
    """The variables to start the interpreter of `engine` with. In the main environment it imports from where
    we do, a user's own folder and PYTHONPATH too; an environment of its own is kept apart from those."""
    if engine.lock is None:
        return {**os.environ, "NM_DISABLE_ANALYTICS": "1"}
    return clean_environment()


def find_python(engine: Engine) -> tuple[Path, tuple[int, int]]:
    """The best Python on the machine that `engine` runs on. Raises UserError when there is none."""
    usable: dict[tuple[int, int], Path] = {}
    for candidate in _candidates(engine):
        version = _probe(candidate)
        if version in engine.pythons:
            usable.setdefault(version, candidate)
        if version == engine.pythons[0]:
            break
    for version in engine.pythons:
        if version in usable:
            return usable[version], version
    wanted = ", ".join("{}.{}".format(*version) for version in sorted(engine.pythons))
    best = "{}.{}".format(*engine.pythons[0])
    raise UserError(
        f"{engine.title} needs Python {wanted} with its venv module, and none is on this machine; "
        f"install one, e.g. apt install python{best}-venv, or: uv python install {best}"
    )


def _status(engine: Engine) -> EngineStatus:
    if engine.lock is None:
        missing = [module for module in engine.modules if importlib.util.find_spec(module) is None]
        return EngineStatus(engine, None if missing else Path(sys.executable), {})
    python = _installed_interpreter(engine)
    if python is None:
        return EngineStatus(engine, None, {})
    marker = json.loads((_folder_of(python) / MARKER).read_text(encoding="utf-8"))
    return EngineStatus(engine, python, marker["versions"])


def _install_command(engine: Engine) -> str:
    if engine.lock is None:
        return f"pip install {' '.join(engine.modules)}"
    return f"dlp-deploy engine install {engine.name}"


def _main_interpreter(engine: Engine) -> Path:
    status = _status(engine)
    if status.python is None:
        raise UserError(f"the engine {engine.name} is not installed; run: {status.advice}")
    return status.python


def _installed_interpreter(engine: Engine) -> Path | None:
    folders = (environment_folder(engine, version) for version in engine.pythons)
    return next((_interpreter(folder) for folder in folders if _is_complete(folder)), None)


def _interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def _folder_of(python: Path) -> Path:
    return python.parent.parent


def _is_complete(folder: Path) -> bool:
    # The interpreter is a link to one elsewhere, which may have been removed since.
    return (folder / MARKER).is_file() and _interpreter(folder).exists()


def _candidates(engine: Engine) -> Iterator[Path]:
    """Interpreters that may suit: this one, those on the PATH, and those of pyenv and uv."""
    yield Path(sys.executable)
    names = ["python{}.{}".format(*version) for version in engine.pythons]
    folders = [Path(entry) for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python")
    for managed in (pyenv, uv):
        folders.extend(sorted(managed.glob("*/bin"), reverse=True))
    for name in names:
        yield from (folder / name for folder in folders if (folder / name).exists())


def _probe(python: Path) -> tuple[int, int] | None:
    """The version of `python`, found by running it: a shim may exist and still not run, and Debian
    splits off ensurepip, without which no environment can be made."""
    program = "import sys, ensurepip, venv; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(python), "-c", program], capture_output=True, text=True, timeout=30, env=clean_environment()
        )
        major, minor = done.stdout.split()
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return int(major), int(minor)


def _create(engine: Engine, python: Path, folder: Path) -> None:
    """Make the environment; whatever an interrupted attempt left there is thrown away first."""
    assert engine.lock is not None
    say(f"Installing {engine.title} (about {engine.download_mb} MB to download). Licence: {engine.licence}")
    if folder.exists():
        shutil.rmtree(folder)
    command = [str(python), "-m", "venv", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, errors="replace", env=clean_environment())
    if made.returncode:
        words = (made.stderr.strip() or made.stdout.strip()).splitlines()[-1:]
        reason = words[0] if words else f"it ended with status {made.returncode}"
        raise UserError(f"{python} cannot make an environment in {folder}: {reason}")
    if engine.before:
        _pip(engine, _interpreter(folder), ["-r", str(engine.before)], total=1)
    _install_locked(engine, _interpreter(folder), engine.lock)
    versions = _check_modules(engine, _interpreter(folder))
    write_json(folder / MARKER, {"engine": engine.name, "licence": engine.licence, "versions": versions})
    say(f"{engine.title} is in {folder}")


def _install_locked(engine: Engine, python: Path, lock: Path) -> None:
    """Install exactly what the lock lists, checked against its hashes, and run no build script but those it
    names with --no-binary."""
    total = sum("==" in line for line in lock.read_text(encoding="utf-8").splitlines())
    _pip(engine, python, ["--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", str(lock)], total)


def _pip(engine: Engine, python: Path, arguments: list[str], total: int) -> None:
    """Run pip install, showing each of `total` packages. Raises UserError with pip's reason when it fails."""
    options = ["--no-input", "--disable-pip-version-check"]
    command = [str(python), "-m", "pip", "install", *options, *arguments]
    environment = {**clean_environment(), "PIP_USER": "0"}
    errors = []
    with (
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as pip,
        progress(f"Installing {engine.name}", total) as advance,
    ):
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                # "Processing" is what pip says of wheels in a folder.
                if line.startswith(("Collecting ", "Processing ", "Ignoring ")):
                    advance(note=line.split()[1].rstrip(":").rpartition("/")[2])
                elif line.startswith("ERROR:"):
                    errors.append(line.removeprefix("ERROR:").strip())
        except BaseException:
            # Waited for: it would write on into a folder that the next attempt removes.
            pip.kill()
            pip.wait()
            raise
    if pip.returncode:
        reason = errors[0] if errors else f"pip ended with status {pip.returncode}"
        raise UserError(
            f"could not install {engine.name}: {reason}; is the package index within reach (pip config list)?"
        )


def _check_modules(engine: Engine, python: Path) -> dict[str, str]:
    """Import the engine in its environment and return the versions of all that is installed there."""
    program = (
        f"import json, {', '.join(engine.modules)}\n"
        "from importlib.metadata import distributions\n"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in distributions()}))"
    )
    command = [str(python), "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{engine.title} does not start on this machine: {last[0]}")
    return dict(sorted(json.loads(done.stdout.splitlines()[-1]).items()))
