"""What `dlp-deploy recipe show`, `check` and `apply` do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..artifact import MASKS, read_manifest
from ..errors import UserError
from ..models import load_config, resolve_model
from ..outline import outline_of
from .masked_checkpoint import Applied, apply_masks
from .masks import open_masks
from .plan import PruningPlan, check_recipe, plan_of
from .ready_made import load_recipe
from .recipe import KINDS, MagnitudePruningModifier, Modifier, Recipe, recipe_yaml
from .text import recipe_text


@dataclass(frozen=True)
class Checked:
    """A recipe that is valid, and fits `model` if one was given.

    `plan` is what `prune --recipe` would do with it, None if it prunes nothing or no model was given;
    `notes` says what was not checked or will not run everywhere.
    """

    modifiers: tuple[str, ...]
    model: str | None
    plan: PruningPlan | None
    notes: tuple[str, ...]


def show(recipe: str | Path) -> str:
    """The recipe in a file, or the ready-made one of that name, as text for people.

    Raises UserError when there is none or it is not valid.
    """
    return recipe_text(load_recipe(recipe))


def check(recipe: str | Path, model: str | None = None) -> Checked:
    """Check a recipe, and whether its targets and sparsities fit `model`.

    Raises UserError naming the first field that is wrong.
    """
    loaded = load_recipe(recipe)
    kinds = tuple(kind for _, kind, _ in loaded.modifiers())
    if model is None:
        return Checked(kinds, None, None, tuple(_notes(loaded)))
    files = resolve_model(model)
    decoder = outline_of(load_config(files))
    try:
        check_recipe(loaded, decoder)
        plan = plan_of(loaded, decoder) if loaded.prunes() else None
    except UserError as error:
        raise UserError(f"{recipe}: {error}") from None
    return Checked(kinds, files.name, plan, tuple(_notes(loaded)))


def _notes(recipe: Recipe) -> Iterator[str]:
    for place, kind, modifier in recipe.modifiers():
        if kind not in KINDS:
            yield f"{place}: not a kind that is known here; its fields were not checked"
        elif _is_unsupported(modifier):
            yield f"{place}.mask_structure: SparseML knows no N:M for magnitude and will refuse it"
    if "eval(" in recipe_yaml(recipe):
        yield "eval(...): SparseML runs what is inside as Python; use it only if you trust its author"


def _is_unsupported(modifier: Modifier) -> bool:
    return isinstance(modifier, MagnitudePruningModifier) and ":" in modifier.mask_structure


def apply(
    source: str | Path,
    model: str,
    output: str | Path,
    force: bool = False,
    calib: str = "c4",
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> Applied:
    """Write `model`, pruned as `source` says, to the folder `output`.

    `source` is a masks.safetensors or an artifact that holds one: the checkpoint `output` then has zeros
    exactly where the masks have them. Or it is a recipe: `output` becomes an artifact, pruned by the
    recipe's method to its sparsities, with the activations measured on the calibration text. Raises
    UserError when the source does not fit the model, and as `apply_masks` and `prune` do.
    """
    path = Path(source)
    if path.is_dir():
        path = path / MASKS
    if path.suffix == ".safetensors":
        return apply_masks(path, model, Path(output), force)
    return _apply_recipe(source, model, Path(output), force, calib, nsamples, seqlen, seed)


def _apply_recipe(
    recipe: str | Path,
    model: str,
    output: Path,
    force: bool,
    calib: str,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> Applied:
    from ..pruning import prune

    checked = check(recipe, model)
    if checked.plan is None:
        raise UserError(f"{recipe} prunes nothing; give a recipe with a pruning modifier, or a mask file")
    artifact = prune(
        model,
        recipe=recipe,
        output=output,
        force=force,
        calib=calib,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
    )
    pruning = read_manifest(artifact).pruning
    weights = sum(block.weights for block in pruning.blocks)
    masks = len(open_masks(artifact / MASKS).names())
    return Applied(artifact, masks, weights, pruning.sparsity, round(weights * pruning.sparsity))
