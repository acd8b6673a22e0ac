"""The engines that can be measured: one file each, found by looking into this folder.

An engine is a description (`ENGINE`) and a worker module, which runs in the engine's own
environment. Adding one is adding a file here and its worker beside the others.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from ...errors import UserError

LOCKS = Path(__file__).resolve().parent.parent / "locks"
# What a worker takes beside its model.
WORKER_BYTES = 400 << 20


@dataclass(frozen=True)
class Engine:
    """What is needed to install and start an engine.

    `worker` is a module of dlp_deploy.bench.workers, or the path of a .py file. `reads` is the sub
    folder of an artifact that holds what it loads, graphs as `model_file`. With `lock`, a file of pinned
    requirements, it lives in an environment of its own on one of the `pythons` (best first); without, it
    runs in the main environment, where `modules` must be importable. `before` lists what is installed
    ahead of the lock and without hashes: packages whose builds differ from index to index. An engine
    without `precisions` does not decode: it runs recipes. `skips_zeros`: it neither stores nor
    multiplies pruned weights. `loaded_bytes_per_byte` is the most memory that it takes for a byte of
    weights while it loads them.
    """

    name: str
    title: str
    worker: str
    reads: str
    precisions: tuple[str, ...]
    licence: str
    modules: tuple[str, ...]
    model_file: str = "model.onnx"
    lock: Path | None = None
    before: Path | None = None
    pythons: tuple[tuple[int, int], ...] = ()
    download_mb: int = 0
    skips_zeros: bool = False
    loaded_bytes_per_byte: float = 3.0
    notes: tuple[str, ...] = ()


@cache
def engines() -> dict[str, Engine]:
    """All engines by name, in the order of their names."""
    modules = sorted(info.name for info in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{module}").ENGINE for module in modules]
    return {engine.name: engine for engine in found}


def engine_named(name: str) -> Engine:
    """The engine called `name`. Raises UserError that lists the engines there are."""
    found = engines().get(name)
    if found is None:
        near = get_close_matches(name, engines(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no engine {name!r}{hint} Engines are: {', '.join(engines())}")
    return found


def has_room(engine: Engine, weight_bytes: int, available_bytes: int) -> bool:
    """Whether a model of this size can be loaded into so much memory."""
    return engine.loaded_bytes_per_byte * weight_bytes + WORKER_BYTES <= 0.9 * available_bytes
