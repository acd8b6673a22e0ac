"""Prune language models layer by layer, export them to sparse ONNX, and measure what that buys on a CPU.

Each command of `dlp-deploy` is one function here, with the same arguments. `bench` and `export` are
both a function and a subpackage: `from dlp_deploy.bench.report import read_report` works as usual.
"""

import os
from typing import TYPE_CHECKING, Any

from .bench import bench
from .errors import UserError
from .export import export
from .prune_export import prune_export

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .export.pack import pack, unpack
    from .finetuning import finetune
    from .pruning import prune
    from .serving import serve

# ONNX Runtime from 1.29 on reports model names, hashes and timings to its makers, unless told not to before
# it loads. Worker processes inherit this.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# torch asks for large pages when it allocates large tensors: blocks are read, converted and thrown away
# all the time, and in small pages half of that time goes into page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Imported when first used, as most bring torch with them.
_LAZY = {
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "pack": "export.pack",
    "prune": "pruning",
    "serve": "serving",
    "unpack": "export.pack",
}

__all__ = [
    "UserError",
    "bench",
    "evaluate",
    "export",
    "finetune",
    "pack",
    "prune",
    "prune_export",
    "serve",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
