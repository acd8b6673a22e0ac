"""What is to be fine-tuned: a pruned checkpoint, its masks, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact import (
    CHECKPOINT,
    MANIFEST,
    MASKS,
    BlockSparsity,
    Finetuning,
    HeadSparsity,
    Pruning,
    Source,
    check_files,
    read_manifest,
)
from ..blocks import BlockModel
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import UserError
from ..families import Decoder, decoder_of
from ..models import ModelFiles, load_config, resolve_model
from ..progress import progress
from ..recipes.masks import Masks, PackedMask, identity_of, mask_of, open_masks, write_masks
from ..recipes.plan import GIVEN

LEAST_SPARSITY = 0.01


@dataclass(frozen=True)
class PrunedModel:
    """A checkpoint with its keep-masks by weight name, and what its manifest says, if it has one."""

    files: ModelFiles
    decoder: Decoder
    checkpoint: Checkpoint
    masks: Masks
    source: Source
    pruning: Pruning
    earlier: tuple[Finetuning, ...] = ()


def open_pruned(model: str, masks: Path | None, dense: ModelFiles | None, work: Path) -> PrunedModel:
    """Open an artifact, or a bare checkpoint whose masks are in the file `masks` or, without, its zeros.

    `dense` is the model before pruning if it is known; masks found as zeros are written to `work`.
    Raises UserError naming the tensor when masks do not fit, when pruned weights are not zero, and when
    there is nothing pruned.
    """
    if (Path(model) / MANIFEST).is_file():
        return _open_artifact(Path(model), masks)
    files = resolve_model(model)
    decoder = decoder_of(load_config(files))
    shape = BlockModel(files, open_checkpoint(files))
    path = masks or work / MASKS
    if masks is None and not path.is_file():
        _write_masks_of_zeros(shape, files, path)
    opened = _checked(path, files, decoder, shape.checkpoint)
    origin = dense or files
    source = Source(
        name=origin.name,
        location=origin.location,
        architecture=shape.config.architectures[0],
        sha256=open_checkpoint(dense).sha256 if dense else opened.model.sha256,
        blocks=decoder.blocks,
        parameters=shape.parameters(),
    )
    return PrunedModel(files, decoder, shape.checkpoint, opened, source, _found(shape, opened))


def is_artifact(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file()


def _open_artifact(folder: Path, masks: Path | None) -> PrunedModel:
    manifest = read_manifest(folder)
    check_files(folder, manifest, (f"{CHECKPOINT}/", MASKS))
    files = ModelFiles(manifest.source.name, str(folder), folder / CHECKPOINT)
    decoder = decoder_of(load_config(files))
    checkpoint = open_checkpoint(files)
    opened = _checked(masks or folder / MASKS, files, decoder, checkpoint)
    return PrunedModel(
        files, decoder, checkpoint, opened, manifest.source, manifest.pruning, manifest.finetuning
    )


def _checked(path: Path, files: ModelFiles, decoder: Decoder, checkpoint: Checkpoint) -> Masks:
    """Open masks that fit the checkpoint and prune nothing that is not zero there."""
    masks = open_masks(path)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    masks.check_fits(identity_of(decoder, files.name, ""), shapes)
    for name in masks.names():
        weights = checkpoint.tensor(name)
        masks.check_weights(name, weights)
        others = int((weights[~masks.mask(name)] != 0).sum())
        if others:
            raise UserError(
                f"{path}: {others:,} weights of {name} that it prunes are not zero in {files.location}; "
                "zero them first: dlp-deploy recipe apply"
            )
    return masks


def _write_masks_of_zeros(model: BlockModel, files: ModelFiles, path: Path) -> None:
    masks: dict[str, PackedMask] = {}
    zeros = 0
    with progress("Reading zeros", model.decoder.blocks) as advance:
        for block in range(model.decoder.blocks):
            for name in model.linear_weights(block).values():
                weights = model.checkpoint.tensor(name)
                masks[name] = mask_of(weights != 0, weights)
                zeros += int((weights == 0).sum())
            advance()
    share = zeros / sum(model.prunable_weights())
    if share < LEAST_SPARSITY:
        raise UserError(
            f"{files.location} is not pruned ({share:.1%} of its block weights are zero); "
            "prune it first: dlp-deploy prune"
        )
    write_masks(path, masks, identity_of(model.decoder, files.name, model.checkpoint.sha256))


def _found(model: BlockModel, masks: Masks) -> Pruning:
    """What can be said of a pruning of which only the masks are known."""
    weights = model.prunable_weights()
    sparsities = []
    for block, count in enumerate(weights):
        names = [name for name in model.linear_weights(block).values() if name in masks.names()]
        sparsities.append(sum(_pruned(masks.mask(name)) for name in names) / count)
    overall = sum(share * count for share, count in zip(sparsities, weights, strict=True)) / sum(weights)
    return Pruning(
        method=GIVEN,
        allocation=GIVEN,
        statistic=None,
        alpha=None,
        pattern="unstructured",
        sparsity_asked=overall,
        sparsity=overall,
        blocks=tuple(
            BlockSparsity(index=index, score=None, asked=share, measured=share, weights=weights[index])
            for index, share in enumerate(sparsities)
        ),
        calibration=None,
        head=_found_head(model, masks),
    )


def _found_head(model: BlockModel, masks: Masks) -> HeadSparsity | None:
    name = f"{model.decoder.family.head}.weight"
    if name not in masks.names():
        return None
    keep = masks.mask(name)
    share = _pruned(keep) / keep.numel()
    return HeadSparsity(asked=share, measured=share, weights=keep.numel(), untied=False)


def _pruned(keep: torch.Tensor) -> int:
    return keep.numel() - int(keep.sum())
