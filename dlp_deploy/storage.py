"""Files that are either whole or absent: atomic writes, digests, and folders renamed when finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from .errors import UserError

PARTIAL_SUFFIX = ".partial"
# A folder that optimum's exporter writes to, on the way to a graph.
TRACED_PREFIX = ".traced-"
_REPLACED = re.compile(r"\.(.+)\.\d+\.old")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there, durably, when the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def is_temporary(path: Path) -> bool:
    """Whether `path` is, or is in, something that is not finished yet or was replaced already."""
    return any(
        part.endswith(PARTIAL_SUFFIX) or part.startswith(TRACED_PREFIX) or _REPLACED.fullmatch(part)
        for part in path.parts
    )


def sync_files(folder: Path) -> None:
    """Make the content of all files below `folder` survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def named(path: Path) -> Path:
    """The same path in a form whose last part is the name: "." has none, and ".." is not one."""
    return path if path.name not in ("", "..") else path.resolve()


def partial_folder(final: Path) -> Path:
    """Where the files of `final` grow until they are whole."""
    final = named(final)
    return final.with_name(final.name + PARTIAL_SUFFIX)


def refuse_existing(path: Path, force: bool, *, file: bool = False) -> None:
    """Raise UserError when `path`, where a folder (or a `file`) is to be written, exists, unless `force` says
    that it may be replaced; and when it is the other of the two, which nothing takes the place of."""
    if path.is_dir() if file else path.is_file():
        kinds = ("folder", "file") if file else ("file", "folder")
        raise UserError(f"{path} is a {kinds[0]}, and a {kinds[1]} is to be written; give another --output")
    if path.exists() and not force:
        raise UserError(f"{path} exists; give another --output, or --force to replace it")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `final`, in place of an older one, when the body succeeds, and is
    removed when it fails.

    Its name is its own: `partial_folder(final)` may hold the hours of a run that is to be resumed.
    """
    final = named(final)
    folder = final.with_name(f".{final.name}.{uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    folder.mkdir(parents=True)
    try:
        yield folder
        replace_folder(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(finished: Path, final: Path) -> None:
    """Move the folder `finished` to `final`, taking the place of an older `final`; of a link to one, whose
    target stays."""
    final = named(final)
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if os.path.lexists(final):
        final.replace(old)
    finished.replace(final)
    sync_folder(final.parent)
    if os.path.lexists(old):
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def drop_leftovers(folder: Path, but: str = "") -> None:
    """Remove what a killed process left unfinished directly below `folder`, all `but` one name, and end its
    replacements: a folder that was moved away comes back where nothing took its place."""
    for path in folder.glob("*"):
        if path.name == but:
            continue
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not path.with_name(replaced[1]).exists():
            path.replace(path.with_name(replaced[1]))
        elif is_temporary(Path(path.name)):
            _remove(path)


def user_cache() -> Path:
    """Folder for downloads and engine environments that outlive one project: $XDG_CACHE_HOME/dlp-deploy."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dlp-deploy"


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left", or a quota or size limit, in the body into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"no room to write {path} ({error.strerror}); free space there") from None
