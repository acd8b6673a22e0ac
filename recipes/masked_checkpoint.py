"""Checkpoints rewritten with one decoder block in memory: with masks applied, or as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint import (
    Checkpoint,
    open_checkpoint,
    shard_name,
    untied_checkpoint,
    write_index,
    write_shard,
)
from ..families import Outline
from ..models import ModelFiles, load_config, load_tokenizer, resolve_model, save_tokenizer
from ..outline import outline_of, untied_config
from ..progress import progress
from ..storage import new_folder, refuse_existing
from .masks import apply_mask, identity_of, open_masks

# Text and settings that belong to a checkpoint; what is not listed here (weights) is not copied.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Applied:
    """What masks or a recipe did to a checkpoint: `sparsity` over the masked weights, `zeroed` new zeros."""

    output: Path
    masks: int
    weights: int
    sparsity: float
    zeroed: int

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.masks} masks over {self.weights:,} weights, sparsity {self.sparsity:.4f}; "
            f"{self.zeroed:,} weights became zero"
        )


def apply_masks(masks: Path, model: str, output: Path, force: bool = False) -> Applied:
    """Write to the folder `output` the checkpoint `model` with every pruned weight set to zero.

    Where the embedding serves as head and the masks have one for the head, it becomes a weight of its own.
    Holds one decoder block in memory. Raises UserError when the masks are for another model: another
    architecture, size, weight name or shape, or unrelated weights.
    """
    refuse_existing(output, force)
    files = resolve_model(model)
    decoder = outline_of(load_config(files))
    checkpoint = open_checkpoint(files)
    opened = open_masks(masks)
    untied = decoder.tied_embeddings and f"{decoder.family.head}.weight" in opened.names()
    if untied:
        checkpoint = untied_checkpoint(checkpoint, decoder.family)
    opened.check_fits(
        identity_of(decoder, files.name, ""), {name: checkpoint.shape(name) for name in checkpoint.names()}
    )
    counts: list[tuple[int, int, int]] = []

    def masked(name: str, weights: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weights
        keep = opened.mask(name)
        opened.check_weights(name, weights)
        zeroed = int((weights[~keep] != 0).sum())
        counts.append((keep.numel(), int((~keep).sum()), zeroed))
        return apply_mask(weights, keep)

    names = set(opened.names())
    with new_folder(output) as folder:
        _write_shards("Applying masks", checkpoint, decoder, folder, masked)
        _copy_companions(files, folder)
        if untied:
            untied_config(load_config(files)).save_pretrained(folder)
    sizes, pruned, zeroed = (sum(column) for column in zip(*counts, strict=True))
    return Applied(output, len(counts), sizes, pruned / sizes, zeroed)


def save_checkpoint(model: str, output: Path, force: bool = False) -> Path:
    """Write `model`, a GGUF file for instance, to `output` as a Hugging Face checkpoint with its tokenizer.

    Raises UserError when `output` exists or the model cannot be read.
    """
    refuse_existing(output, force)
    files = resolve_model(model)
    decoder = outline_of(load_config(files))
    with new_folder(output) as folder:
        _write_shards("Saving", open_checkpoint(files), decoder, folder, lambda name, weights: weights)
        _copy_companions(files, folder)
    return output


def _write_shards(
    description: str,
    checkpoint: Checkpoint,
    decoder: Outline,
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> None:
    """Write every tensor as `change` returns it, one shard per decoder block."""
    shards = list(_shards(checkpoint.names(), decoder))
    with progress(description, len(shards)) as advance:
        for index, names in enumerate(shards):
            tensors = {name: change(name, checkpoint.tensor(name)) for name in names}
            write_shard(folder / shard_name(index, len(shards)), tensors)
            advance()
    write_index(folder)


def _shards(names: list[str], decoder: Outline) -> Iterator[list[str]]:
    """Tensor names shard by shard: those outside the blocks, then each block's."""
    prefixes = [f"{decoder.family.block(index)}." for index in range(decoder.blocks)]
    inside = {name: prefix for prefix in prefixes for name in names if name.startswith(prefix)}
    yield [name for name in names if name not in inside]
    for prefix in prefixes:
        yield [name for name, its_prefix in inside.items() if its_prefix == prefix]


def _copy_companions(files: ModelFiles, folder: Path) -> None:
    if files.gguf is not None:
        load_config(files).save_pretrained(folder)
        save_tokenizer(load_tokenizer(files), folder)
        return
    for pattern in _COMPANIONS:
        for path in files.folder.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
