"""Bytes of pruned weights in less space, without knowing what file they are from.

A piece is seen as elements of 1, 2 or 4 bytes, whichever width saves most:

    piece   width (1 byte: 1, 2 or 4); for width 2 and 4 the mask of the nonzero elements; then as many
            planes as the width: plane i holds byte i of each of these elements
    plane   kind (1 byte), then
            RAW       its bytes
            CONSTANT  the one value (1 byte) that all of them have
            BYTES     fill value (1 byte), mask of the bytes that differ from it, those bytes
            NIBBLES   the same in units of 4 bits, low nibble first; the last byte is padded with zero
    mask    one bit per element, 1 where it is stored, little-endian bit order, padded with zeros

Nothing else is stored: the length of a piece and the ones of its masks give the length of every part.
So fp32, bf16, int8 and 4-bit weights all shrink by about their sparsity (the fill value of unsigned
integers is their zero point), and fp32 that came from fp16 or bf16 by its empty bytes as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

RAW, CONSTANT, BYTES, NIBBLES = range(4)
WIDTHS = (1, 2, 4)
# The width is chosen on this many bytes from the middle of a piece.
SAMPLE = 1 << 15


class DamagedPiece(ValueError):
    """What was read is no piece of the length that was asked for."""


def encode(piece: bytes) -> bytes:
    """The stored form of a piece of at least one byte; at most two bytes longer than it."""
    data = np.frombuffer(piece, np.uint8)
    return _encode(data, _best_width(data))


def decode(read: Callable[[int], bytes], length: int) -> bytes:
    """The piece of `length` bytes whose stored form `read` gives, count by count.

    Raises DamagedPiece.
    """
    (width,) = _exactly(read, 1)
    if width not in WIDTHS or length % width:
        raise DamagedPiece(f"no element width: {width}")
    if width == 1:
        return _decode_plane(read, length).tobytes()
    kept = _read_mask(read, length // width)
    values = np.empty((np.count_nonzero(kept), width), np.uint8)
    for place in range(width):
        values[:, place] = _decode_plane(read, len(values))
    elements = np.zeros(length // width, f"<u{width}")
    elements[kept] = values.view(elements.dtype)[:, 0]
    return elements.tobytes()


def _best_width(data: Bytes) -> int:
    middle = max(0, len(data) - SAMPLE) // 8 * 4
    sample = data[middle : middle + SAMPLE]
    fitting = [width for width in WIDTHS if len(data) % width == 0 and len(sample) % width == 0]
    return min(fitting, key=lambda width: len(_encode(sample, width)))


def _encode(data: Bytes, width: int) -> bytes:
    if width == 1:
        return bytes([1]) + _encode_plane(data)
    elements = data.view(f"<u{width}")
    kept = elements != 0
    values = elements[kept].view(np.uint8)
    planes = (_encode_plane(np.ascontiguousarray(values[place::width])) for place in range(width))
    return b"".join((bytes([width]), _mask(kept), *planes))


def _encode_plane(plane: Bytes) -> bytes:
    counts = np.bincount(plane, minlength=256)
    fill = int(counts.argmax())
    if counts[fill] == len(plane):
        return bytes([CONSTANT, fill])
    # Counts of nibbles follow from those of bytes.
    nibbles = counts.reshape(16, 16).sum(axis=0) + counts.reshape(16, 16).sum(axis=1)
    sizes = {
        RAW: len(plane),
        BYTES: 1 + _mask_bytes(len(plane)) + len(plane) - int(counts[fill]),
        NIBBLES: 1 + _mask_bytes(2 * len(plane)) + len(plane) - (int(nibbles.max()) - 1) // 2,
    }
    kind = min(sizes, key=lambda kind: sizes[kind])
    if kind == RAW:
        return bytes([RAW]) + plane.tobytes()
    units, fill = (plane, fill) if kind == BYTES else (_split(plane), int(nibbles.argmax()))
    kept = units != fill
    values = units[kept] if kind == BYTES else _join(units[kept])
    return bytes([kind, fill]) + _mask(kept) + values.tobytes()


def _decode_plane(read: Callable[[int], bytes], length: int) -> Bytes:
    (kind,) = _exactly(read, 1)
    if kind == RAW:
        return np.frombuffer(_exactly(read, length), np.uint8)
    if kind not in (CONSTANT, BYTES, NIBBLES):
        raise DamagedPiece(f"no kind of plane: {kind}")
    (fill,) = _exactly(read, 1)
    if kind == CONSTANT:
        return np.full(length, fill, np.uint8)
    units = np.full(length if kind == BYTES else 2 * length, fill, np.uint8)
    kept = _read_mask(read, len(units))
    count = int(np.count_nonzero(kept))
    stored = np.frombuffer(_exactly(read, count if kind == BYTES else -(-count // 2)), np.uint8)
    units[kept] = stored if kind == BYTES else _split(stored)[:count]
    return units if kind == BYTES else _join(units)


def _split(data: Bytes) -> Bytes:
    """The nibbles of bytes [n] as bytes [2 n], low nibble first."""
    return np.stack((data & 15, data >> 4), axis=1).reshape(-1)


def _join(nibbles: Bytes) -> Bytes:
    """The inverse of `_split`; an odd number is padded with zero."""
    padded = np.pad(nibbles, (0, len(nibbles) % 2))
    return padded[0::2] | np.left_shift(padded[1::2], np.uint8(4))


def _mask_bytes(count: int) -> int:
    return -(-count // 8)


def _mask(kept: NDArray[np.bool_]) -> bytes:
    return np.packbits(kept, bitorder="little").tobytes()


def _read_mask(read: Callable[[int], bytes], count: int) -> NDArray[np.bool_]:
    bits = np.frombuffer(_exactly(read, _mask_bytes(count)), np.uint8)
    return np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    data = read(count)
    if len(data) != count:
        raise DamagedPiece("the file ends inside a piece")
    return data
