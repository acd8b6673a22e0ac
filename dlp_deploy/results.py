"""What belongs to the whole pruned model: index, config, tokenizer, masks, recipe, manifest."""

from __future__ import annotations

import shutil
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from .artifact import (
    CHECKPOINT,
    MASKS,
    RECIPE,
    Manifest,
    Pruning,
    Source,
    list_files,
    write_manifest,
)
from .checkpoint import combined_sha256, write_index
from .journal import PRUNED
from .models import ModelFiles, load_config, load_tokenizer, save_tokenizer
from .outline import untied_config
from .passes import Run, write_outside_tensors
from .recipes.masks import identity_of, open_masks, write_masks
from .recipes.plan import recipe_from_pruning
from .recipes.recipe import write_recipe
from .unfinished import LOCK, WORK

COMPANIONS = ("generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md")


def write_results(run: Run, files: ModelFiles, pruning: Pruning) -> None:
    """Complete the artifact once all blocks are pruned; the manifest comes last."""
    sha256 = combined_sha256(_digests(run))
    write_companions(files, run.folder / CHECKPOINT, untied=run.head_sparsity is not None)
    _merge_masks(run, files.name, sha256)
    write_recipe(run.folder / RECIPE, recipe_from_pruning(pruning, run.model.decoder.family))
    source = Source(
        name=files.name,
        location=files.location,
        architecture=run.model.config.architectures[0],
        sha256=sha256,
        blocks=run.blocks,
        parameters=run.model.parameters(),
    )
    _write_manifest(run.folder, source, pruning)


def _digests(run: Run) -> dict[str, str]:
    """Digests of all tensors of the dense model. Those outside the blocks are written on the way."""
    digests = write_outside_tensors(run)
    for entry in run.journal.steps(PRUNED):
        digests |= entry["digests"]
    return digests


def write_companions(files: ModelFiles, checkpoint: Path, untied: bool = False) -> None:
    """Put index, config, tokenizer and licence beside the shards of a checkpoint, of which `untied` says that
    it has a head of its own whatever the model had."""
    write_index(checkpoint)
    config = load_config(files)
    (untied_config(config) if untied else config).save_pretrained(checkpoint)
    save_tokenizer(load_tokenizer(files), checkpoint)
    for name in COMPANIONS:
        if files.gguf is None and (files.folder / name).is_file():
            shutil.copyfile(files.folder / name, checkpoint / name)


def _merge_masks(run: Run, name: str, sha256: str) -> None:
    parts = [open_masks(path) for path in run.mask_files]
    joined = {weight: part.packed(weight) for part in parts for weight in part.names()}
    write_masks(run.folder / MASKS, joined, identity_of(run.model.decoder, name, sha256))


def _write_manifest(folder: Path, source: Source, pruning: Pruning) -> None:
    temporary = (WORK + "/", LOCK)
    manifest = Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dlp_deploy=version("dlp-deploy"),
        source=source,
        pruning=pruning,
        files=tuple(file for file in list_files(folder) if not file.path.startswith(temporary)),
    )
    write_manifest(folder, manifest)
