"""The artifact of a fine-tuned model: of the same shape as what prune writes, with its mask proved."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from ..artifact import CHECKPOINT, MASKS, RECIPE, Finetuning, Manifest, list_files, write_manifest
from ..checkpoint import open_checkpoint, shard_name, write_shard
from ..models import ModelFiles
from ..progress import progress
from ..recipes.masks import apply_mask, open_masks
from ..recipes.plan import recipe_from_pruning
from ..recipes.recipe import write_recipe
from ..results import write_companions
from ..storage import sha256_file, sync_folder
from ..unfinished import LOCK, WORK
from .pruned import PrunedModel


def write_tuned_checkpoint(folder: Path, pruned: PrunedModel, tuned: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors `tuned` to `folder`/checkpoint, in the dtype that each had, under its mask.

    Then read back every masked weight. Raises RuntimeError when a pruned one is not zero to the bit.
    """
    checkpoint = pruned.checkpoint
    masked = set(pruned.masks.names())
    shards = _shards(pruned)
    with progress("Writing", len(shards)) as advance:
        for index, names in enumerate(shards):
            tensors = {name: tuned[name].detach().cpu().to(checkpoint.dtype(name)) for name in names}
            for name in masked & tensors.keys():
                tensors[name] = apply_mask(tensors[name], pruned.masks.mask(name))
            write_shard(folder / CHECKPOINT / shard_name(index, len(shards)), tensors)
            advance()
    write_companions(pruned.files, folder / CHECKPOINT)
    shutil.copyfile(pruned.masks.path, folder / MASKS)
    sync_folder(folder)
    prove_masks(folder, pruned)


def _shards(pruned: PrunedModel) -> list[list[str]]:
    """Tensor names by shard, as prune has them: embedding, each block, norm and head."""
    family = pruned.decoder.family
    names = pruned.checkpoint.names()
    blocks = [
        [name for name in names if name.startswith(f"{family.block(index)}.")]
        for index in range(pruned.decoder.blocks)
    ]
    embedding = f"{family.embedding}.weight"
    inside = {name for block in blocks for name in block}
    return [[embedding], *blocks, [name for name in names if name not in inside and name != embedding]]


def prove_masks(folder: Path, pruned: PrunedModel) -> None:
    """Raise RuntimeError unless the artifact in `folder` has the masks that it began with, and keeps them.

    The mask file must be the same byte for byte, and every weight that it prunes +0.0 on disk.
    """
    if sha256_file(folder / MASKS) != sha256_file(pruned.masks.path):
        raise RuntimeError(f"{folder / MASKS} is not the mask file that fine-tuning began with")
    checkpoint = open_checkpoint(ModelFiles(folder.name, str(folder), folder / CHECKPOINT))
    masks = open_masks(folder / MASKS)
    with progress("Checking the mask", len(masks.names())) as advance:
        for name in masks.names():
            zeros = checkpoint.tensor(name)[~masks.mask(name)]
            if zeros.view(torch.uint8).any():
                raise RuntimeError(f"{folder}: fine-tuning changed pruned weights of {name}")
            advance()


def write_tuned_manifest(folder: Path, pruned: PrunedModel, record: Finetuning) -> None:
    """Write recipe and manifest, which completes the artifact."""
    write_recipe(folder / RECIPE, recipe_from_pruning(pruned.pruning, pruned.decoder.family))
    files = tuple(file for file in list_files(folder) if not file.path.startswith((f"{WORK}/", LOCK)))
    manifest = Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        dlp_deploy=version("dlp-deploy"),
        source=pruned.source,
        pruning=pruned.pruning,
        finetuning=(*pruned.earlier, record),
        files=files,
    )
    write_manifest(folder, manifest)
