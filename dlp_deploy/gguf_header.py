"""The header of a GGUF file (version 2 or 3, little-endian): metadata, and where each tensor is.

The gguf package's GGUFReader makes an array of every token and merge of the vocabulary, which takes
seconds in each process; this reads the same in a fraction of one.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from .errors import UserError

NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the file. `shape` is in numpy's order: rows first."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    bytes: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


@lru_cache(maxsize=2)
def read_header(path: Path) -> Header:
    """Read the header. Raises UserError when the file is not whole."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Cursor(data).header()
        except (struct.error, ValueError, KeyError, UnicodeDecodeError, MemoryError, OverflowError) as error:
            raise UserError(f"{path} is no whole GGUF file ({error}); download it again") from None
        end = max((tensor.offset + tensor.bytes for tensor in header.tensors.values()), default=0)
        if end > len(data):
            raise UserError(f"{path} is truncated: {len(data)} of {end} bytes; download it again")
    return header


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def header(self) -> Header:
        magic, version = self.numbers("4s", 1)[0], self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"version {version} is unknown")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        metadata = {self.text(): self.value(GGUFValueType(self.number("I"))) for _ in range(key_count)}
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        start = -(-self.position // alignment) * alignment
        return Header(metadata, {info[0]: _placed(info, start) for info in infos})

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}" if code != "4s" else "<4s")
        values = layout.unpack_from(self.data, self.position)
        self.position += layout.size
        return values

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def text(self) -> str:
        length = self.number("Q")
        end = self.position + length
        if end > len(self.data):
            raise ValueError("a text ends beyond the file")
        raw = self.data[self.position : end]
        self.position = end
        return raw.decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(NUMBERS[kind])
        element, count = GGUFValueType(self.number("I")), self.number("Q")
        if element in NUMBERS:
            return list(self.numbers(NUMBERS[element], count))
        return [self.value(element) for _ in range(count)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.text()
        dimensions = self.numbers("Q", self.number("I"))
        return name, dimensions[::-1], GGMLQuantizationType(self.number("I")), self.number("Q")


def _placed(info: tuple[str, tuple[int, ...], GGMLQuantizationType, int], start: int) -> TensorInfo:
    name, shape, quantization, offset = info
    block, bytes_of_block = GGML_QUANT_SIZES[quantization]
    return TensorInfo(name, shape, quantization, start + offset, prod(shape) // block * bytes_of_block)
