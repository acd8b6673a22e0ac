"""The limits of the control groups that this process is in, v1 or v2: processor time and memory."""

from __future__ import annotations

from pathlib import Path

from .kernel_files import ROOT, memory_bytes, read_text

# What cpu.stat of a cgroup calls the time in which it was throttled, and its unit in seconds.
_THROTTLED = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
# The files of a cgroup that say its limit and its usage of memory: v2, then v1.
_MEMORY_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores that this process's cgroups (v2 or v1) grant, the tightest of them; None without limit."""
    limits = []
    for folder in _cgroup_folders(root):
        if (text := read_text(folder / "cpu.max")) and not text.startswith("max"):
            quota, period = text.split()
            limits.append(int(quota) / int(period))
        quota_us, period_us = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        if quota_us and period_us and int(quota_us) > 0:
            limits.append(int(quota_us) / int(period_us))
    return min(limits, default=None)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that new processes can use without swapping, within the cgroup's limit."""
    free = [memory_bytes(root)["MemAvailable"]]
    for folder in _cgroup_folders(root):
        for limit_file, usage_file in _MEMORY_LIMITS:
            limit, used = read_text(folder / limit_file), read_text(folder / usage_file)
            if limit and used and limit != "max":
                free.append(max(0, int(limit) - int(used) + _cached_files(folder)))
    return min(free)


def _cached_files(folder: Path) -> int:
    """Bytes of files that a cgroup's usage counts, and that go when memory is wanted: all that an export
    has lately written, for one."""
    lines = (read_text(folder / "memory.stat") or "").splitlines()
    counted = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    # v1 counts the groups below in those with "total_" only, v2 always.
    kinds = ("inactive_file", "active_file")
    return sum(counted.get(f"total_{kind}", counted.get(kind, 0)) for kind in kinds)


def throttled_seconds(root: Path = ROOT) -> float:
    """Seconds that this process's cgroups (v2 or v1) have kept their threads from running, since boot."""
    found = [0.0]
    for folder in _cgroup_folders(root):
        for line in (read_text(folder / "cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name in _THROTTLED:
                found.append(int(value) * _THROTTLED[name])
    return max(found)


def _cgroup_folders(root: Path) -> list[Path]:
    """Folders of this process's cgroups and their parents: any of them may hold a limit."""
    base = root / "sys/fs/cgroup"
    folders = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        hierarchy = base / controllers if controllers else base
        group = hierarchy / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(hierarchy)]
    return [folder for folder in dict.fromkeys([*folders, base, base / "cpu"]) if folder.is_dir()]
