"""Transport form of an artifact: one file, in which pruned weights are masks and nonzeros.

Zeros in ONNX initializers and safetensors cost as much disk as other weights; in a file "NAME.dlp" they
cost a bit. Unpacking gives back every byte, checked against the manifest.

    8 bytes   magic "DLPPACK" and the version, "1"
    8 bytes   length of the manifest, little endian
    manifest  manifest.json as it is in the artifact: path, size and SHA-256 of every file
    files     in the manifest's order, each in pieces of 1 MiB (the last may be shorter) as pieces.py
              stores them; a file whose SHA-256 has occurred before is left out
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ..artifact import MANIFEST, Manifest, StoredFile, parse_manifest, read_manifest
from ..errors import UserError
from ..progress import Advance, progress, say
from ..storage import atomic_path, named, naming_full_disk, new_folder, refuse_existing
from ..threads import map_in_threads
from .pieces import DamagedPiece, decode, encode
from .reshaped import restore_graph

MAGIC = b"DLPPACK1"
SUFFIX = ".dlp"
PIECE = 1 << 20
PIECES_AT_ONCE = 32
# Far above any manifest; a damaged length must not be believed.
MOST_MANIFEST_BYTES = 1 << 28
_LENGTH = struct.Struct("<Q")


def pack(artifact: Path | str, output: Path | str | None = None, force: bool = False) -> Path:
    """Write the artifact into one file (default: beside it, NAME.dlp) and return its path.

    Raises UserError when a file differs from the manifest, when there is no room, and when the output
    exists, unless `force` says to replace it. Memory: a few pieces.
    """
    folder = Path(artifact)
    manifest = read_manifest(folder)
    path = Path(output) if output else named(folder).with_name(named(folder).name + SUFFIX)
    refuse_existing(path, force, file=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(path), atomic_path(path) as temporary, temporary.open("wb") as stream:
        text = (folder / MANIFEST).read_bytes()
        stream.write(MAGIC + _LENGTH.pack(len(text)) + text)
        with progress("Packing", _pieces(manifest)) as advance:
            for stored in _distinct(manifest):
                _pack_file(folder / stored.path, stored, stream, advance)
    before, packed = sum(stored.bytes for stored in manifest.files), path.stat().st_size
    say(f"{path}: {packed / 1e6:.0f} MB for {before / 1e6:.0f} MB ({packed / max(before, 1):.0%})")
    return path


def unpack(packed: Path | str, output: Path | str | None = None, force: bool = False) -> Path:
    """Restore the artifact that `pack` wrote (default: beside the file, without .dlp); return its folder.

    Raises UserError when the file is damaged or cut short, when there is no room, and when the output
    exists, unless `force` says to replace it, or holds the file. Nothing is left behind then.
    """
    path = Path(packed)
    final = Path(output) if output else path.with_name(path.name.removesuffix(SUFFIX))
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if final == path:
        raise UserError(f"{path} does not end in {SUFFIX}; say where to unpack it with --output")
    if path.resolve().is_relative_to(final.resolve()):
        raise UserError(f"{path} is in {final}, which would be replaced; give another --output")
    refuse_existing(final, force)
    with naming_full_disk(final), path.open("rb") as stream, new_folder(final) as folder:
        manifest = _read_head(stream, path, folder)
        written: dict[str, Path] = {}
        with progress("Unpacking", _pieces(manifest)) as advance:
            for stored in manifest.files:
                target = _new_file(folder, stored, path)
                if stored.sha256 in written:
                    shutil.copyfile(written[stored.sha256], target)
                else:
                    _unpack_file(stream, stored, target, path, advance)
                    written[stored.sha256] = target
        if stream.read(1):
            raise UserError(f"{path} is damaged: it goes on behind its last file; copy or pack it again")
    return final


def _distinct(manifest: Manifest) -> list[StoredFile]:
    first: dict[str, StoredFile] = {}
    for stored in manifest.files:
        first.setdefault(stored.sha256, stored)
    return list(first.values())


def _pieces(manifest: Manifest) -> int:
    return sum(-(-stored.bytes // PIECE) for stored in _distinct(manifest))


def _pack_file(source: Path, stored: StoredFile, stream: BinaryIO, advance: Advance) -> None:
    digest = hashlib.sha256()
    try:
        if source.suffix == ".onnx":
            restore_graph(source, stored.sha256)
        with source.open("rb") as file:
            while pieces := _some_pieces(file):
                for piece, form in zip(pieces, map_in_threads(_checked, pieces), strict=True):
                    digest.update(piece)
                    stream.write(form)
                    advance(note=stored.path)
    except FileNotFoundError:
        raise UserError(f"{source} is missing; export the artifact again") from None
    if digest.hexdigest() != stored.sha256:
        raise UserError(f"{source} was altered after export (its SHA-256 differs); export it again")


def _some_pieces(file: BinaryIO) -> list[bytes]:
    """The next pieces of a file, to be worked on at the same time; none at its end."""
    return [piece for _ in range(PIECES_AT_ONCE) if (piece := file.read(PIECE))]


def _checked(piece: bytes) -> bytes:
    """The stored form of a piece, after making sure that the piece can be had back from it."""
    form = encode(piece)
    if decode(BytesIO(form).read, len(piece)) != piece:
        raise RuntimeError("a packed piece does not come back as it was")
    return form


def _read_head(stream: BinaryIO, path: Path, folder: Path) -> Manifest:
    """Check the magic, and put the manifest into `folder`."""
    head = stream.read(len(MAGIC) + _LENGTH.size)
    if not head.startswith(MAGIC):
        raise UserError(f"{path} was not written by dlp-deploy pack (or by another version of it)")
    length = int.from_bytes(head[len(MAGIC) :], "little")
    text = stream.read(min(length, MOST_MANIFEST_BYTES))
    if len(text) != length:
        raise UserError(f"{path} is cut short; copy or pack it again")
    manifest = parse_manifest(text, path)
    (folder / MANIFEST).write_bytes(text)
    return manifest


def _new_file(folder: Path, stored: StoredFile, path: Path) -> Path:
    """An empty file for `stored` below `folder`. Raises UserError where another one is in its way."""
    target = folder / stored.path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(exist_ok=False)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: its manifest has two files at {stored.path}; do not trust it") from None
    return target


def _unpack_file(stream: BinaryIO, stored: StoredFile, target: Path, path: Path, advance: Advance) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for start in range(0, stored.bytes, PIECE):
            try:
                piece = decode(stream.read, min(PIECE, stored.bytes - start))
            except DamagedPiece as error:
                raise UserError(
                    f"{path} is damaged at {stored.path} ({error}); copy or pack it again"
                ) from None
            digest.update(piece)
            file.write(piece)
            advance(note=stored.path)
    if digest.hexdigest() != stored.sha256:
        raise UserError(f"{path} is damaged at {stored.path} (its SHA-256 differs); copy or pack it again")
