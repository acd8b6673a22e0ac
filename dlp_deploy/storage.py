"""Files that are either whole or absent: atomic writes, digests, and folders renamed when finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

PARTIAL_SUFFIX = ".partial"


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


def partial_folder(final: Path) -> Path:
    """Where the files of `final` grow until they are whole."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


def refuse_existing(path: Path, force: bool) -> None:
    """Raise UserError when `path` exists, unless `force` says that it may be replaced."""
    if path.exists() and not force:
        raise UserError(f"{path} exists; give another --output, or --force to replace it")


def replace_folder(finished: Path, final: Path) -> None:
    """Move the folder `finished` to `final`, taking the place of an older `final`."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.replace(old)
    finished.replace(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


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
