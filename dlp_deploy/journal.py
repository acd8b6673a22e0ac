"""The durable list of finished steps by which a killed run knows where to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .storage import naming_full_disk, sync_folder

EMBEDDED, SHARED, SCORED, PRUNED, HEAD = "embedded", "shared", "scored", "pruned", "head"
RESUMED, EVALUATED, TRAINED = "resumed", "evaluated", "trained"


class Journal:
    """JSON lines, one for each step; a step is appended only after its results are on disk to stay.

    A line that a power cut left half-written is dropped: its step will be done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        written = path.read_bytes() if path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            os.truncate(path, len(whole))
        self._entries: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def steps(self, step: str) -> list[dict[str, Any]]:
        """All entries of one kind, oldest first."""
        return [entry for entry in self._entries if entry["step"] == step]

    def any_block(self) -> bool:
        """Whether any block is finished, in either pass, or trained: something worth going on from."""
        return any(entry["step"] in (SCORED, PRUNED, TRAINED) for entry in self._entries)

    def append(self, step: str, **facts: Any) -> None:
        """Record a finished step, durably."""
        entry = {"step": step, **facts}
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(self.path.parent)
        self._entries.append(entry)
