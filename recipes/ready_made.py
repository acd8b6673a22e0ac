"""The recipes that come with the package, by name."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from ..artifact import RECIPE
from ..errors import UserError
from .recipe import Recipe, parse_recipe, read_recipe

SUFFIX = ".yaml"


def ready_made() -> list[str]:
    """Names of the recipes that come with the package, such as "llama2-7b-dlp-70"."""
    files = resources.files(__package__).iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))


def ready_made_text(name: str) -> str:
    """The YAML text of a recipe that comes with the package. Raises UserError for an unknown name."""
    if name not in ready_made():
        near = difflib.get_close_matches(name, ready_made(), n=3, cutoff=0.4) or ready_made()
        raise UserError(f"no recipe {name}: neither a file nor ready-made; ready-made are: {', '.join(near)}")
    return resources.files(__package__).joinpath(name + SUFFIX).read_text(encoding="utf-8")


def load_recipe(recipe: str | Path) -> Recipe:
    """The recipe in a file or in an artifact's folder, or the ready-made one of that name.

    Raises UserError when there is none, or when it is not valid.
    """
    path = Path(recipe)
    if path.is_dir():
        return read_recipe(path / RECIPE)
    if isinstance(recipe, Path) or path.exists() or path.suffix in (SUFFIX, ".yml", ".json"):
        return read_recipe(path)
    return parse_recipe(ready_made_text(recipe), recipe)
