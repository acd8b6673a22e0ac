"""What this machine has and what it lacks, each with what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bench.cgroups import available_memory, cpu_quota
from .bench.engines import Engine
from .bench.environments import EngineStatus, cache_folder, find_python, list_engines
from .bench.kernel_files import ROOT
from .bench.machine import describe_machine
from .errors import UserError

State = Literal["ok", "note", "missing"]

LIBRARIES = (
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "optimum-onnx",
    "numpy",
    "safetensors",
    "huggingface_hub",
)
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 3.0
# The demo's artifact and an engine's environment need about this much; a 7B artifact ten times as much.
LITTLE_DISK = 5e9
LITTLE_MEMORY = 4e9


@dataclass(frozen=True)
class Check:
    """One finding. A "missing" one stops something from working; `advice` says what and how to get it."""

    name: str
    state: State
    value: str
    advice: str = ""


def doctor(root: Path = ROOT, hub: str | None = None) -> tuple[Check, ...]:
    """Look at Python, processor, cores, memory, disk, libraries, engines and the hub.

    `root` is where /proc and /sys are; `hub` is the address to try (None: HF_ENDPOINT or huggingface.co).
    Nothing here raises: what cannot be had is a check that says so.
    """
    return (
        _python(),
        *_processor(root),
        _memory(root),
        *(_disk(name, folder) for name, folder in (("here", Path.cwd()), ("cache", cache_folder()))),
        *(_library(name) for name in LIBRARIES),
        *(_engine(status) for status in list_engines()),
        _hub(hub or os.environ.get("HF_ENDPOINT", HUB)),
    )


def print_checks(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print a table of the checks on stdout."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for check in checks:
        found = (
            f"{check.value}: {check.advice}" if check.value and check.advice else check.value or check.advice
        )
        table.add_row(check.name, marks[check.state], Text(found))
    console.print(table)


def _python() -> Check:
    current = (int(platform.python_version_tuple()[0]), int(platform.python_version_tuple()[1]))
    if OLDEST_PYTHON <= current <= NEWEST_PYTHON:
        return Check("Python", "ok", platform.python_version())
    return Check("Python", "note", platform.python_version(), "tested with 3.10 to 3.13")


def _processor(root: Path) -> tuple[Check, ...]:
    machine, quota = describe_machine(root), cpu_quota(root)
    limits = f", {machine.usable_cores} usable" if machine.usable_cores < machine.physical_cores else ""
    limits += f" (cgroup quota {quota:g})" if quota is not None else ""
    cores = f"{machine.physical_cores} physical, {machine.logical_cores} logical{limits}"
    if "avx2" not in machine.isa:
        isa = Check("vector instructions", "missing", "no AVX2", "the CPU engines do not run here")
    elif "avx512_vnni" in machine.isa or "avx_vnni" in machine.isa:
        isa = Check("vector instructions", "ok", ", ".join(machine.isa))
    else:
        hint = "without VNNI int8 gains less, and DeepSparse's own pipelines need prompt_sequence_length=32"
        isa = Check("vector instructions", "note", ", ".join(machine.isa), hint)
    return Check("processor", "ok", machine.cpu), isa, Check("cores", "ok", cores)


def _memory(root: Path) -> Check:
    total, free = describe_machine(root).memory_bytes, available_memory(root)
    value = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB available"
    if free < LITTLE_MEMORY:
        return Check("memory", "note", value, "enough for small models only")
    return Check("memory", "ok", value)


def _disk(name: str, folder: Path) -> Check:
    # The folder may not exist yet; its nearest ancestor is on the same disk.
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    value = f"{free / 1e9:.1f} GB free at {folder}"
    if not os.access(existing, os.W_OK):
        return Check(f"disk ({name})", "missing", value, "the folder cannot be written to")
    if free < LITTLE_DISK:
        return Check(f"disk ({name})", "note", value, "a 7B model needs about 60 GB")
    return Check(f"disk ({name})", "ok", value)


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "missing", "", f"install it with: pip install {name}")


def _engine(status: EngineStatus) -> Check:
    name = f"engine {status.engine.name}"
    if status.python:
        return Check(name, "ok", f"{status.engine.title}; licence: {status.engine.licence}")
    return Check(name, "missing", _why_not(status.engine), f"install it with: {status.advice}")


def _why_not(engine: Engine) -> str:
    """Why the engine could not be installed as things are, or that it just is not."""
    if engine.lock is None:
        return "not installed"
    try:
        find_python(engine)
    except UserError as error:
        return str(error)
    return "not installed"


def _hub(address: str) -> Check:
    offline = "models and texts of the hub are out of reach: use local folders and --calib builtin"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Check("hub", "note", "switched off by HF_HUB_OFFLINE", offline)
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return Check("hub", "ok", f"{address} answers")
    except urllib.error.HTTPError as error:
        return Check("hub", "note", f"{address} answers with status {error.code}", offline)
    except (OSError, ValueError) as error:
        return Check("hub", "note", f"{address} does not answer ({error})", offline)
