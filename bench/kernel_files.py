"""What the kernel says, in files below a root: "/", or a folder that describes another machine."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str | None:
    """The text of a file, stripped; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def numbers(ranges: str) -> list[int]:
    """The numbers of a kernel list such as "0-3,8"."""
    found: list[int] = []
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found


def entries(path: Path) -> dict[str, str]:
    """The "name: value" lines of a file; of a name that comes more than once, the last."""
    pairs = (line.partition(":") for line in (read_text(path) or "").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def memory_bytes(root: Path) -> dict[str, int]:
    """The sizes in /proc/meminfo."""
    return {name: int(value.split()[0]) * 1024 for name, value in entries(root / "proc/meminfo").items()}
