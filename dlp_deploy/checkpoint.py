"""Reading checkpoints tensor by tensor, and writing them shard by shard.

Readers take what they are asked for into memory of its own and keep nothing mapped, so that the resident
memory of a run is the tensors it holds. Formats: safetensors and .bin (weights only), sharded or not, GGUF.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError, first_line
from .families import Family
from .gguf_model import gguf_tensors
from .models import INDEX_FILES, WEIGHT_FILES, ModelFiles, load_config
from .outline import outline_of
from .recipes.masks import weights_sha256
from .storage import atomic_path, naming_full_disk, write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EXPONENT_BITS: dict[torch.dtype, tuple[Any, Any]] = {
    torch.float64: (np.uint64, np.uint64(0x7FF0_0000_0000_0000)),
    torch.float32: (np.uint32, np.uint32(0x7F80_0000)),
    torch.float16: (np.uint16, np.uint16(0x7C00)),
    torch.bfloat16: (np.uint16, np.uint16(0x7F80)),
}
CHUNK = 1 << 16
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what it looks like; `read` brings it into memory of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    read: Callable[[], torch.Tensor]


class Checkpoint:
    """The tensors of a checkpoint by their Hugging Face names. A tied output head is not among them."""

    def __init__(self, tensors: Mapping[str, StoredTensor], location: str) -> None:
        self.location = location
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; float32 for what GGUF stores quantized."""
        return self._tensors[name].dtype

    def stored(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def file(self, name: str) -> Path:
        return self._tensors[name].file

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in its stored dtype. Raises UserError naming tensor and file when it holds NaN or Inf."""
        stored = self._tensors[name]
        tensor = stored.read()
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(f"{stored.file}: tensor {name} holds NaN or Inf; get an intact checkpoint")
        return tensor

    @cached_property
    def sha256(self) -> str:
        """Digest of all tensors; reads the whole checkpoint, one tensor in memory at a time."""
        return combined_sha256({name: tensor_sha256(self.tensor(name)) for name in self._tensors})


def untied_checkpoint(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The same tensors and, where the embedding serves as head, these once more under the head's name."""
    tensors = {name: checkpoint.stored(name) for name in checkpoint.names()}
    tensors.setdefault(f"{family.head}.weight", tensors[f"{family.embedding}.weight"])
    return Checkpoint(tensors, checkpoint.location)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a floating-point tensor on the CPU holds neither NaN nor Inf.

    Both have all bits of the exponent set; looking at these is many times faster than torch.isfinite.
    """
    integer, exponent = EXPONENT_BITS[tensor.dtype]
    bits = np.frombuffer(_bytes_of(tensor), integer)
    chunks = (bits[start : start + CHUNK] for start in range(0, len(bits), CHUNK))
    return all(((chunk & exponent) != exponent).all() for chunk in chunks)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 (hex) over the tensor's bytes, as masks.safetensors records it."""
    return weights_sha256(tensor.reshape(-1))


def combined_sha256(digests: Mapping[str, str]) -> str:
    """One digest for a checkpoint from those of its tensors: the same for any sharding and file format."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Open the weights of a model; no tensor is read yet.

    Raises UserError naming the file when a shard is missing, truncated, or not what the index says.
    """
    decoder = outline_of(load_config(files))
    tensors = dict(_gguf(files.gguf, decoder) if files.gguf is not None else _folder(files.folder))
    tensors = _by_full_names(tensors, decoder.family)
    if decoder.tied_embeddings:
        tensors.pop(f"{decoder.family.head}.weight", None)
    return Checkpoint(tensors, files.location)


def _by_full_names(tensors: dict[str, StoredTensor], family: Family) -> dict[str, StoredTensor]:
    """Names as in the causal language model, also where its base model was saved, as in OPT's own files."""
    base, _, embedding = f"{family.embedding}.weight".partition(".")
    if embedding not in tensors:
        return tensors
    full = (f"{base}.", f"{family.head}.")
    return {name if name.startswith(full) else f"{base}.{name}": tensor for name, tensor in tensors.items()}


def _gguf(path: Path, decoder: Any) -> Iterator[tuple[str, StoredTensor]]:
    for tensor in gguf_tensors(path, decoder):
        yield tensor.name, StoredTensor(tensor.info.shape, torch.float32, path, tensor.read)


def _folder(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    for index in INDEX_FILES:
        if (folder / index).is_file():
            yield from _sharded(folder / index)
            return
    for weights in WEIGHT_FILES:
        if (folder / weights).is_file():
            yield from _entries(folder / weights).items()
            return
    raise UserError(f"{folder} is no checkpoint: it has neither {INDEX_FILES[0]} nor {WEIGHT_FILES[0]}")


def _sharded(index: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({os.fspath(shard) for shard in shard_of.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards; download it again") from None
    for shard in shards:
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise UserError(f"{path} is missing, though {index.name} lists it; download it again")
        stored = _entries(path)
        for name in (name for name, its_shard in shard_of.items() if its_shard == shard):
            if name not in stored:
                raise UserError(f"{path} lacks tensor {name}, which {index.name} lists; download it again")
            yield name, stored[name]


def _entries(path: Path) -> dict[str, StoredTensor]:
    return safetensors_entries(path) if path.suffix == ".safetensors" else _bin_entries(path)


def safetensors_entries(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header. Raises UserError when the file is not whole."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
        text = stream.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is truncated or no safetensors file; download it again") from None
    if 8 + length + end != size:
        raise UserError(f"{path} is truncated: {size} of {8 + length + end} bytes; download it again")
    return {name: _safetensors_entry(path, name, entry, 8 + length) for name, entry in header.items()}


def _safetensors_entry(path: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{path}: tensor {name} is stored as {entry['dtype']}, which is not supported")
    shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
    offset = start + entry["data_offsets"][0]
    return StoredTensor(shape, dtype, path, partial(_read_bytes, path, offset, shape, dtype))


def _read_bytes(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    target = _bytes_of(tensor)
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        filled = 0
        while filled < len(target):
            count = stream.readinto(target[filled:])
            if not count:
                raise UserError(f"{path} became shorter while it was read; download it again")
            filled += count
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _bin_entries(path: Path) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, path, partial(_read_bin, path, name))
        for name, tensor in _load_bin(path).items()
        if isinstance(tensor, torch.Tensor)
    }


def _read_bin(path: Path, name: str) -> torch.Tensor:
    return _load_bin(path)[name].clone(memory_format=torch.contiguous_format)


def _load_bin(path: Path) -> dict[str, Any]:
    """Map a .bin file; files in the format before torch 1.6 cannot be mapped and are read."""
    try:
        with path.open("rb") as stream:
            zipped = stream.read(2) == b"PK"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or unsafe to load: {first_line(error)}") from None


def shard_name(index: int, count: int) -> str:
    """Standard name of shard `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all, and durably. Raises UserError when the disk is full."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the data aligned to 8 bytes
    with naming_full_disk(path), atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            stream.write(_bytes_of(tensor.detach().cpu().contiguous()))


def write_index(folder: Path) -> None:
    """Write the index over all shards in `folder`, from their headers."""
    weight_map: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("model-*-of-*.safetensors")):
        for name, stored in safetensors_entries(path).items():
            weight_map[name] = path.name
            total += torch.Size(stored.shape).numel() * stored.dtype.itemsize
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})
