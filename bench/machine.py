"""The machine: its cores, what its processor can do, and which cores a run may use.

Everything is read from /proc and /sys below `root`, so that other machines can be described in tests.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..progress import say

ROOT = Path("/")
# What cpu.stat of a cgroup calls the time in which it was throttled, and its unit in seconds.
_THROTTLED = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
# The files of a cgroup that say its limit and its usage of memory: v2, then v1.
_MEMORY_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
# A core below this share of the fastest one's speed is of another kind; favoured ones are just a bit faster.
ANOTHER_KIND = 0.85
# Instruction sets that decide how fast an engine is, as /proc/cpuinfo names them.
TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
)


@dataclass(frozen=True)
class LogicalCpu:
    """One hardware thread: its number, and the physical core, socket and NUMA node it belongs to.

    `core` is the lowest number among the hardware threads of that core.
    """

    number: int
    core: int
    socket: int
    node: int


@dataclass(frozen=True)
class Machine:
    """What a reader needs to know to judge or repeat a measurement. Sizes in bytes.

    `cpu_quota` is the cgroup limit in cores, None when there is none; `usable_cores` are the physical
    cores that affinity and quota leave. `governor` is None where the kernel does not say, as in most
    virtual machines.
    """

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    sockets: int
    numa_nodes: int
    physical_cores: int
    logical_cores: int
    usable_cores: int
    cpu_quota: float | None
    caches: dict[str, int]
    governor: str | None
    clock_ghz: float | None
    hypervisor: bool
    memory_bytes: int
    kernel: str
    operating_system: str


@dataclass(frozen=True)
class _Cache:
    """One cache: its name (L1d, L1i, L2, L3), its size in bytes, and the list of the threads that use it."""

    level: int
    name: str
    size: int
    shared_by: str


def describe_machine(root: Path = ROOT) -> Machine:
    """Read the machine's description."""
    cpus, info = read_topology(root), _cpuinfo(root)
    flags = info.get("flags", "").split()
    return Machine(
        cpu=info.get("model name", platform.processor() or "unknown"),
        architecture=platform.machine(),
        isa=tuple(flag for flag in TELLING_FLAGS if flag in flags),
        sockets=len({cpu.socket for cpu in cpus}),
        numa_nodes=len({cpu.node for cpu in cpus}),
        physical_cores=len({cpu.core for cpu in cpus}),
        logical_cores=len(cpus),
        usable_cores=usable_cores(root),
        cpu_quota=cpu_quota(root),
        caches={cache.name: cache.size for cache in _caches_of(root, cpus[0].number)},
        governor=_read(root / f"sys/devices/system/cpu/cpu{cpus[0].number}/cpufreq/scaling_governor"),
        clock_ghz=_clock_ghz(root, cpus[0].number, info),
        hypervisor="hypervisor" in flags,
        memory_bytes=_meminfo(root)["MemTotal"],
        kernel=platform.release(),
        operating_system=_os_name(root),
    )


def read_topology(root: Path = ROOT) -> tuple[LogicalCpu, ...]:
    """All online hardware threads, by number."""
    base = root / "sys/devices/system/cpu"
    nodes = _nodes(root)
    found = []
    for number in _numbers(_read(base / "online") or "0"):
        topology = base / f"cpu{number}" / "topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        socket = _read(topology / "physical_package_id")
        # Without topology (some containers) each hardware thread counts as a core of its own.
        core = _numbers(siblings)[0] if siblings else number
        found.append(LogicalCpu(number, core, max(0, int(socket or 0)), nodes.get(number, 0)))
    return tuple(found)


def choose_cores(
    count: int | None, root: Path = ROOT, allowed: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Logical CPU numbers of `count` distinct physical cores (None: all usable ones), one per core.

    They are on the smallest NUMA node that has so many, or else on as few nodes as can be. `allowed`
    defaults to this process's affinity. Of a hybrid processor the fast cores come first, and None takes no
    others: the slow ones would set the pace. Raises UserError when there are not so many.
    """
    nodes = _allowed_cores(root, allowed)
    fast, most = _fast_cores([core for node in nodes for core in node], root), _granted(nodes, root)
    wanted = min(most, len(fast)) if count is None else count
    _require_cores(wanted, most, root)
    if count is None and wanted < most:
        say(f"Using the {wanted} fast cores; slower ones would set the pace (--cores {most} takes them too)")
    if wanted > len(fast):
        say(f"--cores {wanted}: {wanted - len(fast)} of them are slower cores, which will set the pace")
    else:
        nodes = [kept for node in nodes if (kept := [core for core in node if core in fast])]
    fitting = [node for node in nodes if len(node) >= wanted]
    largest_first = sorted(nodes, key=len, reverse=True)
    chosen = [min(fitting, key=len)] if fitting else largest_first
    fast_first = sorted((core for node in chosen for core in node), key=lambda core: core not in fast)
    return tuple(fast_first[:wanted])


def nodes_of(cores: Sequence[int], root: Path = ROOT) -> tuple[int, ...]:
    """The NUMA nodes that the hardware threads `cores` belong to."""
    return tuple(sorted({cpu.node for cpu in read_topology(root) if cpu.number in set(cores)}))


def siblings_of(cores: Sequence[int], root: Path = ROOT) -> tuple[int, ...]:
    """The other hardware threads of the physical cores of `cores`."""
    cpus = read_topology(root)
    physical = {cpu.core for cpu in cpus if cpu.number in set(cores)}
    return tuple(cpu.number for cpu in cpus if cpu.core in physical and cpu.number not in set(cores))


def cores_beside(cores: Sequence[int], root: Path = ROOT) -> tuple[int, ...]:
    """The hardware threads of all other physical cores, which share the memory with `cores`."""
    own = {*cores, *siblings_of(cores, root)}
    return tuple(cpu.number for cpu in read_topology(root) if cpu.number not in own)


def usable_cores(root: Path = ROOT, allowed: Iterable[int] | None = None) -> int:
    """How many physical cores affinity (or `allowed`) and cgroup leave us, slow ones too."""
    return _granted(_allowed_cores(root, allowed), root)


def cache_bytes(cores: Sequence[int], root: Path = ROOT) -> int:
    """What the caches of `cores` from the second level on hold together; those that they share count once."""
    held: dict[tuple[str, str], int] = {}
    for core in cores:
        for cache in _caches_of(root, core):
            if cache.level > 1:
                held[cache.name, cache.shared_by] = cache.size
    return sum(held.values())


def require_avx2(root: Path = ROOT) -> None:
    """Raise UserError on a processor that the engines' kernels do not run on."""
    flags = _cpuinfo(root).get("flags", "").split()
    if "avx2" not in flags:
        name = _cpuinfo(root).get("model name", platform.machine())
        raise UserError(f"{name} has no AVX2, which the engines need; use an x86-64 processor that has it")


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores that this process's cgroups (v2 or v1) grant, the tightest of them; None without limit."""
    limits = []
    for folder in _cgroup_folders(root):
        if (text := _read(folder / "cpu.max")) and not text.startswith("max"):
            quota, period = text.split()
            limits.append(int(quota) / int(period))
        quota_us, period_us = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota_us and period_us and int(quota_us) > 0:
            limits.append(int(quota_us) / int(period_us))
    return min(limits, default=None)


def available_memory(root: Path = ROOT) -> int:
    """Bytes that new processes can use without swapping, within the cgroup's limit."""
    free = [_meminfo(root)["MemAvailable"]]
    for folder in _cgroup_folders(root):
        for limit_file, usage_file in _MEMORY_LIMITS:
            limit, used = _read(folder / limit_file), _read(folder / usage_file)
            if limit and used and limit != "max":
                free.append(max(0, int(limit) - int(used) + _cached_files(folder)))
    return min(free)


def _cached_files(folder: Path) -> int:
    """Bytes of files that a cgroup's usage counts, and that go when memory is wanted: all that an export
    has lately written, for one."""
    lines = (_read(folder / "memory.stat") or "").splitlines()
    counted = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    # v1 counts the groups below in those with "total_" only, v2 always.
    kinds = ("inactive_file", "active_file")
    return sum(counted.get(f"total_{kind}", counted.get(kind, 0)) for kind in kinds)


def throttled_seconds(root: Path = ROOT) -> float:
    """Seconds that this process's cgroups (v2 or v1) have kept their threads from running, since boot."""
    found = [0.0]
    for folder in _cgroup_folders(root):
        for line in (_read(folder / "cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name in _THROTTLED:
                found.append(int(value) * _THROTTLED[name])
    return max(found)


def _allowed_cores(root: Path, allowed: Iterable[int] | None) -> list[list[int]]:
    """For each NUMA node the first allowed hardware thread of each of its physical cores."""
    permitted = set(os.sched_getaffinity(0) if allowed is None else allowed)
    first: dict[int, LogicalCpu] = {}
    for cpu in read_topology(root):
        if cpu.number in permitted:
            first.setdefault(cpu.core, cpu)
    nodes: dict[int, list[int]] = {}
    for cpu in sorted(first.values(), key=lambda cpu: (cpu.node, cpu.number)):
        nodes.setdefault(cpu.node, []).append(cpu.number)
    return list(nodes.values())


def _require_cores(wanted: int, most: int, root: Path) -> None:
    if wanted < 1:
        raise UserError(f"--cores {wanted}: at least one core is needed")
    if wanted > most:
        physical = len({cpu.core for cpu in read_topology(root)})
        limit = f", of which affinity and cgroup leave us {most}" if most < physical else ""
        has = f"this machine has {physical} physical core{'s' if physical > 1 else ''}{limit}"
        raise UserError(f"--cores {wanted}: {has}; use --cores {most}{' or fewer' if most > 1 else ''}")


def _granted(nodes: Sequence[Sequence[int]], root: Path) -> int:
    """How many of the cores in `nodes` a cgroup's quota lets work all the time."""
    quota, most = cpu_quota(root), sum(map(len, nodes))
    return most if quota is None else min(most, max(1, math.floor(quota)))


def _fast_cores(cores: Sequence[int], root: Path) -> set[int]:
    """Those of `cores` that are of the fastest kind among them: all, unless the processor is a hybrid one."""
    speeds = _speeds(cores, root)
    fastest = max(speeds.values(), default=0.0)
    return {core for core, speed in speeds.items() if speed >= ANOTHER_KIND * fastest}


def _speeds(cores: Sequence[int], root: Path) -> dict[int, float]:
    """How fast each core is, in a unit that is the same for all; alike where the kernel does not say."""
    devices = root / "sys/devices"
    performance = _read(devices / "cpu_core/cpus")
    if performance and _read(devices / "cpu_atom/cpus"):
        fast = set(_numbers(performance))
        return {core: float(core in fast) for core in cores}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        stated = [_read(devices / f"system/cpu/cpu{core}" / name) for core in cores]
        if all(stated):
            return {core: float(value or 0) for core, value in zip(cores, stated, strict=True)}
    return dict.fromkeys(cores, 1.0)


def _cgroup_folders(root: Path) -> list[Path]:
    """Folders of this process's cgroups and their parents: any of them may hold a limit."""
    base = root / "sys/fs/cgroup"
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        hierarchy = base / controllers if controllers else base
        group = hierarchy / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(hierarchy)]
    return [folder for folder in dict.fromkeys([*folders, base, base / "cpu"]) if folder.is_dir()]


def _nodes(root: Path) -> dict[int, int]:
    folder = root / "sys/devices/system/node"
    return {
        cpu: int(node.name.removeprefix("node"))
        for node in folder.glob("node[0-9]*")
        for cpu in _numbers(_read(node / "cpulist") or "")
    }


def _clock_ghz(root: Path, cpu: int, info: Mapping[str, str]) -> float | None:
    """The base clock, or where the kernel does not say, the present one: an idle processor's is lower."""
    base = _read(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/base_frequency")
    if base:
        return round(int(base) / 1e6, 3)
    return round(float(info["cpu MHz"]) / 1000, 3) if "cpu MHz" in info else None


def _caches_of(root: Path, cpu: int) -> Iterator[_Cache]:
    """The caches that hardware thread `cpu` uses."""
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
        level, kind, size = (_read(index / name) for name in ("level", "type", "size"))
        if level and kind and size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            shared_by = _read(index / "shared_cpu_list") or str(cpu)
            yield _Cache(int(level), f"L{level}{suffix}", _bytes(size), shared_by)


def _bytes(size: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1])
    return int(size[:-1]) * factor if factor else int(size)


def _numbers(ranges: str) -> list[int]:
    """The numbers of a kernel list such as "0-3,8"."""
    numbers: list[int] = []
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _cpuinfo(root: Path) -> dict[str, str]:
    """The entry of the first processor in /proc/cpuinfo."""
    first = (_read(root / "proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _meminfo(root: Path) -> dict[str, int]:
    pairs = (line.split(":") for line in (_read(root / "proc/meminfo") or "").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _os_name(root: Path) -> str:
    for line in (_read(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return platform.system()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def busy_share(cpus: Sequence[int], seconds: float = 0.5, root: Path = ROOT) -> float:
    """Share of the time of the hardware threads `cpus` that is used now, watched for some `seconds`."""
    before, start = processor_time(cpus, root), time.perf_counter()
    time.sleep(seconds)
    after, elapsed = processor_time(cpus, root), time.perf_counter() - start
    return (sum(after.values()) - sum(before.values())) / (elapsed * len(cpus))


def processor_time(cpus: Sequence[int], root: Path = ROOT) -> dict[str, float]:
    """Seconds that the hardware threads `cpus` were busy and were stolen by a hypervisor, since boot."""
    tick = os.sysconf("SC_CLK_TCK")
    busy = stolen = 0
    wanted = {f"cpu{number}" for number in cpus}
    for line in (_read(root / "proc/stat") or "").splitlines():
        name, *counts = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return {"busy": busy / tick, "stolen": stolen / tick}
