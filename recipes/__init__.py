"""SparseML recipes and bit-packed masks: formats, ready-made recipes, and what `recipe` commands do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands import apply, check, show

__all__ = ["apply", "check", "show"]


def __getattr__(name: str) -> Any:
    # Not at import: reading checkpoints needs .masks, and the commands need to read checkpoints.
    if name in __all__:
        from . import commands

        return getattr(commands, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
