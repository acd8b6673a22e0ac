"""Masks applied to a checkpoint, such as a fine-tune of the model that they were made for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint, shard_name, write_index, write_shard
from ..families import Decoder, decoder_of
from ..models import ModelFiles, load_config, load_tokenizer, resolve_model, save_tokenizer
from ..progress import progress
from ..storage import partial_folder, refuse_existing, replace_folder
from .masks import Masks, apply_mask, identity_of, open_masks

# Text and settings that belong to a checkpoint; what is not listed here (weights) is not copied.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Applied:
    """What applying masks did: `sparsity` over the masked weights, and how many of them it newly zeroed."""

    output: Path
    masks: int
    weights: int
    sparsity: float
    zeroed: int


def apply_masks(masks: Path, model: str, output: Path, force: bool = False) -> Applied:
    """Write to the folder `output` the checkpoint `model` with every pruned weight set to zero.

    Holds one decoder block in memory. Raises UserError when the masks are for another model: another
    architecture, size, weight name or shape, or unrelated weights.
    """
    refuse_existing(output, force)
    files = resolve_model(model)
    decoder = decoder_of(load_config(files))
    checkpoint = open_checkpoint(files)
    opened = open_masks(masks)
    opened.check_fits(
        identity_of(decoder, files.name, ""), {name: checkpoint.shape(name) for name in checkpoint.names()}
    )
    with _new_folder(output) as folder:
        counts = _write_masked(checkpoint, opened, decoder, folder)
        _copy_companions(files, folder)
    weights = sum(size for size, _, _ in counts)
    return Applied(
        output,
        len(counts),
        weights,
        sum(pruned for _, pruned, _ in counts) / weights,
        sum(zeroed for _, _, zeroed in counts),
    )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when the body succeeds and is removed when it fails."""
    folder = partial_folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        replace_folder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_masked(
    checkpoint: Checkpoint, masks: Masks, decoder: Decoder, folder: Path
) -> list[tuple[int, int, int]]:
    """Write the shards; (weights, pruned, newly zeroed) of every masked tensor."""
    masked = set(masks.names())
    shards = list(_shards(checkpoint.names(), decoder))
    counts = []
    with progress("Applying masks", len(shards)) as advance:
        for index, names in enumerate(shards):
            tensors = {name: checkpoint.tensor(name) for name in names}
            for name in masked.intersection(names):
                keep = masks.mask(name)
                masks.check_weights(name, tensors[name])
                zeroed = int((tensors[name][~keep] != 0).sum())
                counts.append((keep.numel(), int((~keep).sum()), zeroed))
                tensors[name] = apply_mask(tensors[name], keep)
            write_shard(folder / shard_name(index, len(shards)), tensors)
            advance()
    write_index(folder)
    return counts


def _shards(names: list[str], decoder: Decoder) -> Iterator[list[str]]:
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
