"""Keep-masks of a pruned model, one bit a weight, in a safetensors file.

Format "dlp-masks", version 1. One uint8 tensor per pruned weight, under the name that the weight has
in the Hugging Face checkpoint ("model.layers.0.self_attn.q_proj.weight"), of shape
[rows, ceil(columns / 8)]. Weight [r, c] is kept when bit `c % 8` (bit 0 is the least significant:
little-endian bit order) of byte [r, c // 8] is 1; the unused high bits of a row's last byte are 0. Rows
start on byte boundaries, so a slice of rows is a slice of bytes.

The file's metadata holds four strings: "format", "version", "model" (JSON of `ModelIdentity`) and
"modules" (JSON: weight name -> {"shape": [rows, columns], "sha256": digest of the source weights,
"signs": `sign_sample` of the source weights}).
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..families import Outline
from ..storage import atomic_path, naming_full_disk

FORMAT = "dlp-masks"
VERSION = "1"
SIGNS = 256
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ModelIdentity:
    """The model that masks were made for.

    `name` and `sha256` (of the dense checkpoint) say which one it was. A fine-tune differs in both, so
    masks fit a checkpoint when the other fields, which fine-tuning never changes, are equal.
    """

    name: str
    sha256: str
    family: str
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    norm_epsilon: float


def identity_of(decoder: Outline, name: str, sha256: str) -> ModelIdentity:
    return ModelIdentity(
        name=name,
        sha256=sha256,
        family=decoder.family.name,
        blocks=decoder.blocks,
        hidden=decoder.hidden,
        intermediate=decoder.intermediate,
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        norm_epsilon=decoder.norm_epsilon,
    )


def check_same_model(masks: ModelIdentity, checkpoint: ModelIdentity) -> None:
    """Raise UserError naming the first field in which the two are not the same model."""
    for field in fields(ModelIdentity):
        if field.name in ("name", "sha256"):
            continue
        expected, found = getattr(masks, field.name), getattr(checkpoint, field.name)
        if expected != found:
            raise UserError(
                f"these masks are for another model: {field.name} is {expected} in {masks.name}, "
                f"{found} in {checkpoint.name}; take the masks of a pruning of this model"
            )


def pack_mask(keep: torch.Tensor | NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack a bool mask [rows, columns] (True: kept) into uint8 [rows, ceil(columns / 8)]."""
    return np.packbits(_as_bool(keep), axis=1, bitorder="little")


def unpack_mask(bits: NDArray[np.uint8], shape: tuple[int, int]) -> torch.Tensor:
    """The bool mask of `shape` that `pack_mask` packed into `bits`."""
    unpacked = np.unpackbits(bits, axis=1, count=shape[1], bitorder="little")
    return torch.from_numpy(unpacked.view(np.bool_))


def _as_bool(keep: torch.Tensor | NDArray[np.bool_]) -> NDArray[np.bool_]:
    array = keep.detach().cpu().numpy() if isinstance(keep, torch.Tensor) else keep
    if array.dtype != np.bool_ or array.ndim != 2:
        raise TypeError(f"a mask is a bool matrix, not {array.dtype} of {array.ndim} dimensions")
    return array


def weights_sha256(weights: torch.Tensor) -> str:
    """SHA-256 (hex) over the bytes of `weights` in their stored dtype, in row-major order."""
    return hashlib.sha256(weights.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def sign_sample(weights: torch.Tensor) -> str:
    """Which of 256 evenly spaced weights are negative: a bit each, packed little-endian, in hex.

    Fine-tuning leaves nearly all signs as they are; in another model half of them differ.
    """
    return np.packbits((_spaced(weights) < 0).numpy(), bitorder="little").tobytes().hex()


def _spaced(weights: torch.Tensor) -> torch.Tensor:
    flat = weights.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SIGNS)][:SIGNS].cpu()


def sign_agreement(signs: str, weights: torch.Tensor) -> float | None:
    """Share of the sampled weights whose sign is the source's; None when too few are not zero to tell."""
    sample = _spaced(weights)
    packed = np.frombuffer(bytes.fromhex(signs), np.uint8)
    if packed.size != -(-sample.numel() // 8):
        return None
    negative = torch.from_numpy(np.unpackbits(packed, count=sample.numel(), bitorder="little").view(np.bool_))
    nonzero = sample != 0
    if nonzero.sum() < SIGNS // 8:
        return None
    return (negative == (sample < 0))[nonzero].float().mean().item()


@dataclass(frozen=True)
class PackedMask:
    """One weight's mask: `bits` is uint8 [rows, ceil(columns / 8)] for `shape` = (rows, columns).

    `source_sha256` and `source_signs` (a `sign_sample`, "" if unknown) tell the weights it is for.
    """

    shape: tuple[int, int]
    bits: NDArray[np.uint8]
    source_sha256: str
    source_signs: str = ""

    def keep(self) -> torch.Tensor:
        """The mask as bool [rows, columns], True where the weight is kept."""
        return unpack_mask(self.bits, self.shape)

    def sparsity(self) -> float:
        """Share of weights that are pruned."""
        return 1.0 - int(self.keep().sum()) / (self.shape[0] * self.shape[1])


def mask_of(keep: torch.Tensor, source: torch.Tensor) -> PackedMask:
    """Pack `keep` together with the digest of the weights that it was decided on."""
    if keep.shape != source.shape:
        raise ValueError(f"a mask of shape {tuple(keep.shape)} for weights of shape {tuple(source.shape)}")
    rows, columns = keep.shape
    return PackedMask((rows, columns), pack_mask(keep), weights_sha256(source), sign_sample(source))


def write_masks(path: Path, masks: Mapping[str, PackedMask], model: ModelIdentity) -> None:
    """Write `masks`, whole or not at all, one mask in memory at a time when they are mapped from files."""
    header = _header(masks, model)
    with naming_full_disk(path), atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)))
        stream.write(header)
        for mask in masks.values():
            stream.write(np.ascontiguousarray(mask.bits).data)


def _header(masks: Mapping[str, PackedMask], model: ModelIdentity) -> bytes:
    modules = {
        name: {"shape": mask.shape, "sha256": mask.source_sha256, "signs": mask.source_signs}
        for name, mask in masks.items()
    }
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "model": json.dumps(asdict(model)),
            "modules": json.dumps(modules),
        }
    }
    start = 0
    for name, mask in masks.items():
        end = start + mask.bits.size
        header[name] = {"dtype": "U8", "shape": mask.bits.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)  # safetensors wants the data aligned to 8 bytes


def merge_masks(path: Path, parts: Sequence[Path]) -> None:
    """Join mask files of one model (as written block by block) into one, streaming from file to file.

    Raises UserError when the parts are of different models or hold the same weight twice.
    """
    opened = [open_masks(part) for part in parts]
    joined: dict[str, PackedMask] = {}
    for part, masks in zip(parts, opened, strict=True):
        if masks.model != opened[0].model:
            raise UserError(
                f"{part}: masks of {masks.model.name}, but {parts[0]} is of {opened[0].model.name}"
            )
        for name in masks.names():
            if name in joined:
                raise UserError(f"{part}: the mask of {name} is in an earlier file as well")
            joined[name] = masks.packed(name)
    write_masks(path, joined, opened[0].model)


@dataclass(frozen=True)
class _Module:
    shape: tuple[int, int]
    sha256: str
    signs: str


class Masks:
    """An open mask file. Bits are mapped, not read: only the masks that are asked for cost memory."""

    def __init__(self, path: Path, file: Any, model: ModelIdentity, modules: dict[str, _Module]) -> None:
        self.path = path
        self.model = model
        self._file = file
        self._modules = modules

    def names(self) -> list[str]:
        """Names of the masked weights, in file order."""
        return list(self._modules)

    def shape(self, name: str) -> tuple[int, int]:
        return self._modules[name].shape

    def packed(self, name: str) -> PackedMask:
        module = self._modules[name]
        return PackedMask(module.shape, self._file.get_tensor(name).numpy(), module.sha256, module.signs)

    def mask(self, name: str) -> torch.Tensor:
        """The keep-mask of weight `name`: bool [rows, columns]."""
        return self.packed(name).keep()

    def check_fits(self, model: ModelIdentity, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless every mask has a weight of its name and shape in this model."""
        check_same_model(self.model, model)
        for name, module in self._modules.items():
            if name not in shapes:
                raise UserError(
                    f"{self.path}: {name} is not in {model.name}; these masks are for another model"
                )
            if tuple(shapes[name]) != module.shape:
                raise UserError(
                    f"{self.path}: {name} is {_times(module.shape)} here and {_times(shapes[name])} "
                    f"in {model.name}; these masks are for another model"
                )

    def check_weights(self, name: str, weights: torch.Tensor) -> None:
        """Raise UserError when `weights` are clearly not those of weight `name`, tuned or not.

        Names and shapes alone cannot tell LLaMA-7B from LLaMA2-7B.
        """
        agreement = sign_agreement(self._modules[name].signs, weights)
        if agreement is not None and agreement < 0.75:
            raise UserError(
                f"{self.path}: only {agreement:.0%} of the weights of {name} have the sign that they have in "
                f"{self.model.name}; these masks are for another model"
            )


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def apply_mask(weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """A copy of `weights` with +0.0 wherever `keep` is False."""
    pruned = weights.clone()
    zero_pruned(pruned, keep)
    return pruned


def zero_pruned(weights: torch.Tensor, keep: torch.Tensor) -> None:
    """Set `weights` to +0.0, in place, wherever `keep` is False.

    Multiplying the bits by 0 or 1 is several times faster than torch.masked_fill on a CPU.
    """
    weights.view(_INTEGERS[weights.itemsize]).mul_(keep.to(weights.device))


def open_masks(path: Path) -> Masks:
    """Open a mask file. Raises UserError when it is missing, damaged, or not of this format."""
    if not path.is_file():
        raise UserError(f"{path}: no such mask file")
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); copy or prune it again") from None
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no masks (its format is {metadata.get('format')!r}, not {FORMAT!r})")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"{path}: masks of version {metadata.get('version')}; this dlp-deploy reads version {VERSION}"
        )
    try:
        model = ModelIdentity(**json.loads(metadata["model"]))
        modules = {name: _module(entry) for name, entry in json.loads(metadata["modules"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error}); prune again") from None
    if not modules:
        raise UserError(f"{path} holds the mask of no weight; prune again")
    _check_bits(path, file, modules)
    return Masks(path, file, model, modules)


def _module(entry: Mapping[str, Any]) -> _Module:
    rows, columns = entry["shape"]
    bytes.fromhex(entry["signs"])  # a ValueError here rather than when it is needed
    return _Module((int(rows), int(columns)), str(entry["sha256"]), entry["signs"])


def _check_bits(path: Path, file: Any, modules: Mapping[str, _Module]) -> None:
    if set(file.keys()) != set(modules):
        odd = sorted(set(file.keys()) ^ set(modules))[0]
        raise UserError(f"{path}: {odd} is not both in the metadata and in the data; prune again")
    for name, module in modules.items():
        rows, columns = module.shape
        bits = file.get_slice(name)
        if bits.get_dtype() != "U8" or list(bits.get_shape()) != [rows, (columns + 7) // 8]:
            raise UserError(
                f"{path}: the bits of {name} do not fit its shape {_times(module.shape)}; prune again"
            )
