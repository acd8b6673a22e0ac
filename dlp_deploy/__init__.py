"""Prune language models layer by layer, export them to sparse ONNX, and measure what that buys on a CPU.

Each command of `dlp-deploy` is one function here, with the same arguments. `bench` and `export` are
both a function and a subpackage: `from dlp_deploy.bench.report import read_report` works as usual.
"""

from typing import TYPE_CHECKING, Any

from .bench import bench
from .errors import UserError
from .export import export
from .prune_export import prune_export

if TYPE_CHECKING:
    from .evaluation import evaluate
    from .pruning import prune

# Imported when first used, as each brings torch with it.
_LAZY = {"evaluate": "evaluation", "prune": "pruning"}

__all__ = ["UserError", "bench", "evaluate", "export", "prune", "prune_export"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
