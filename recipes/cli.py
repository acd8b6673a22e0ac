"""The commands of `dlp-deploy recipe`: show, check and apply."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import Calib, Force, Length, Samples, Seed

app = typer.Typer(no_args_is_help=True, help="Read, check and apply SparseML recipes and masks.")


@app.command()
def show(recipe: Annotated[str, typer.Argument(help="A file or a ready-made name.")]) -> None:
    """Print what a recipe does, block by block."""
    from . import show

    print(show(recipe))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A file or a ready-made name.")],
    model: Annotated[str | None, typer.Option(help="Check the targets against this model, too.")] = None,
) -> None:
    """Check a recipe's types and, with --model, that its targets and sparsities fit."""
    from . import check

    checked = check(recipe, model)
    print(f"{recipe} is valid: {', '.join(checked.modifiers)}")
    for note in checked.notes:
        print(f"note: {note}")


@app.command()
def apply(
    source: Annotated[str, typer.Argument(help="A mask file, the artifact that holds one, or a recipe.")],
    model: Annotated[str, typer.Option(help="The checkpoint to prune, e.g. a fine-tune of the same model.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Force = False,
    calib: Calib = "c4",
    nsamples: Samples = 128,
    seqlen: Length = 2048,
    seed: Seed = 0,
) -> None:
    """Zero the weights of a checkpoint that masks prune, or prune it as a recipe says.

    Masks need no calibration text; they fit any fine-tune of the model that they were made for.
    """
    options = locals().copy()
    from . import apply

    print(apply(**options))
