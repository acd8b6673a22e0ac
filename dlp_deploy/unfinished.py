"""The folder of a run that is not finished: begun, locked, resumed, and given its name in the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .artifact import CHECKPOINT, MANIFEST
from .errors import UserError
from .journal import Journal
from .storage import PARTIAL_SUFFIX, partial_folder, replace_folder, sync_folder, write_json

JOURNAL = "journal.jsonl"
SETTINGS = "settings.json"
LOCK = ".lock"
WORK = "work"


def work_folder(partial: Path) -> Path:
    """Below the growing artifact: what is needed only until the run is done."""
    return partial / WORK


@contextmanager
def unfinished_run(final: Path, settings: dict[str, Any], resume: bool, force: bool) -> Iterator[Path]:
    """Yield the folder in which `final` grows, and move it to `final` when the body succeeds.

    With `resume`, a folder in which blocks are finished is taken as it is, and so is a whole one that
    lacks only its name. `settings` are what the result depends on. Raises UserError when an unfinished
    run is in the way, was begun with other settings, or is still running, and when another run, such as an
    export, writes to the `final` that is to be replaced.
    """
    partial = partial_folder(final)
    with _alone_if_there(final):
        # Told now rather than hours later, when its place is to be taken.
        partial.mkdir(parents=True, exist_ok=True)
    with alone_in(partial):
        _begin(partial, settings, resume, force)
        with _removed_if_nothing_finished(partial):
            yield partial
        _drop_work(partial)
        (partial / LOCK).unlink(missing_ok=True)
        with _alone_if_there(final):
            replace_folder(partial, final)


def _alone_if_there(folder: Path) -> AbstractContextManager[None]:
    return alone_in(folder) if folder.is_dir() else nullcontext()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder` while the body runs. Raises UserError when another process does."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is writing to {folder}; wait for it, or name another folder") from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _begin(partial: Path, settings: dict[str, Any], resume: bool, force: bool) -> None:
    """Fill the folder of a new run, or check that the blocks found in it are of the same run."""
    stored = work_folder(partial) / SETTINGS
    if resume and _lacks_only_its_name(partial):
        _drop_work(partial)
        return
    if _finished_any_block(partial):
        if resume:
            _check_same(json.loads(stored.read_text(encoding="utf-8")), settings, partial)
            _remove_half_written(partial)
            return
        if not force:
            raise UserError(
                f"{partial} holds an unfinished run; add --resume to go on, or --force to drop it"
            )
    _clear(partial)
    (partial / CHECKPOINT).mkdir()
    work_folder(partial).mkdir()
    write_json(stored, settings)
    sync_folder(partial)


def _lacks_only_its_name(partial: Path) -> bool:
    return (partial / MANIFEST).is_file() and not work_folder(partial).exists()


def _drop_work(partial: Path) -> None:
    """Remove the work folder; by its name it is there as a whole or not at all."""
    dropped = partial / f".{WORK}.dropped"
    if work_folder(partial).exists():
        work_folder(partial).replace(dropped)
    shutil.rmtree(dropped, ignore_errors=True)


def _finished_any_block(partial: Path) -> bool:
    return Journal(work_folder(partial) / JOURNAL).any_block()


def _check_same(before: dict[str, Any], now: dict[str, Any], partial: Path) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{partial} was begun with {name} {before.get(name)}, now it is {value}; "
                "resume with the same, or start over with --force"
            )


def _remove_half_written(partial: Path) -> None:
    """A killed process could not remove the temporary file that it was writing."""
    for path in partial.rglob(f".*{PARTIAL_SUFFIX}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


@contextmanager
def _removed_if_nothing_finished(partial: Path) -> Iterator[None]:
    """Leave no folder behind a run that ended before its first block, such as one with a wrong option."""
    try:
        yield
    except BaseException:
        if not (_finished_any_block(partial) or _lacks_only_its_name(partial)):
            shutil.rmtree(partial)
        raise
