"""The cores of the machine: how they hang together, and which of them a run may use."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..progress import say
from .cgroups import cpu_quota
from .kernel_files import ROOT, entries, numbers, read_text

# A core below this share of the fastest one's speed is of another kind; favoured ones are just a bit faster.
ANOTHER_KIND = 0.85


@dataclass(frozen=True)
class LogicalCpu:
    """One hardware thread: its number, and the physical core, socket and NUMA node it belongs to.

    `core` is the lowest number among the hardware threads of that core.
    """

    number: int
    core: int
    socket: int
    node: int


def read_topology(root: Path = ROOT) -> tuple[LogicalCpu, ...]:
    """All online hardware threads, by number."""
    base = root / "sys/devices/system/cpu"
    nodes = _nodes(root)
    found = []
    for number in numbers(read_text(base / "online") or "0"):
        topology = base / f"cpu{number}" / "topology"
        siblings = read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list")
        socket = read_text(topology / "physical_package_id")
        # Without topology (some containers) each hardware thread counts as a core of its own.
        core = numbers(siblings)[0] if siblings else number
        found.append(LogicalCpu(number, core, max(0, int(socket or 0)), nodes.get(number, 0)))
    return tuple(found)


def choose_cores(
    count: int | None, root: Path = ROOT, allowed: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Logical CPU numbers of `count` distinct physical cores (None: all usable ones), one per core.

    They are on the smallest NUMA node that has so many, or else on the smallest such socket, and there on as
    few nodes as can be; on nodes whose memory this process may use, if these have so many. `allowed`
    defaults to this process's affinity. Of a hybrid processor the fast cores come first, and None takes no
    others: the slow ones would set the pace. Raises UserError when there are not so many.
    """
    cores = _allowed_cores(root, allowed)
    fast, most = _fast_cores(cores, root), _granted(len(cores), root)
    wanted = min(most, len(fast)) if count is None else count
    _require_cores(wanted, most, root)
    if count is None and wanted < most:
        say(f"Using the {wanted} fast cores; slower ones would set the pace (--cores {most} takes them too)")
    if wanted > len(fast):
        say(f"--cores {wanted}: {wanted - len(fast)} of them are slower cores, which will set the pace")
    else:
        cores = fast
    chosen = _near_each_other(cores, wanted, nodes_with_memory(root))
    fast_first = sorted(chosen, key=lambda core: core not in fast)
    return tuple(core.number for core in fast_first[:wanted])


def nodes_of(cores: Sequence[int], root: Path = ROOT) -> tuple[int, ...]:
    """The NUMA nodes that the hardware threads `cores` belong to."""
    return tuple(sorted({cpu.node for cpu in read_topology(root) if cpu.number in set(cores)}))


def nodes_with_memory(root: Path = ROOT) -> tuple[int, ...]:
    """The NUMA nodes that have memory which this process may use: a node may have none, and a cgroup's
    cpuset may keep us off it."""
    stated = (
        read_text(root / "sys/devices/system/node/has_memory"),
        entries(root / "proc/self/status").get("Mems_allowed_list"),
    )
    limits = [set(numbers(nodes)) for nodes in stated if nodes]
    known = {cpu.node for cpu in read_topology(root)}
    return tuple(sorted(set.intersection(*limits) if limits else known))


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
    return _granted(len(_allowed_cores(root, allowed)), root)


def _allowed_cores(root: Path, allowed: Iterable[int] | None) -> list[LogicalCpu]:
    """The first allowed hardware thread of each physical core that has one."""
    permitted = set(os.sched_getaffinity(0) if allowed is None else allowed)
    first: dict[int, LogicalCpu] = {}
    for cpu in read_topology(root):
        if cpu.number in permitted:
            first.setdefault(cpu.core, cpu)
    return list(first.values())


def _near_each_other(cores: Sequence[LogicalCpu], wanted: int, home: Collection[int]) -> list[LogicalCpu]:
    """At least `wanted` of `cores`, the ones to be taken first: those of the largest NUMA nodes, and before
    all others those of the nodes `home`."""
    at_home = [core for core in cores if core.node in home]
    if len(at_home) >= wanted:
        cores = at_home
    cores = _smallest_place(cores, wanted)
    sizes = Counter(core.node for core in cores)
    return sorted(cores, key=lambda core: (core.node not in home, -sizes[core.node], core.node, core.number))


def _smallest_place(cores: Sequence[LogicalCpu], wanted: int) -> Sequence[LogicalCpu]:
    """Those of the smallest node that has `wanted` of them, or else of the smallest such socket, or all."""
    places: tuple[Callable[[LogicalCpu], int], ...] = (lambda core: core.node, lambda core: core.socket)
    for place in places:
        groups = [
            [core for core in cores if place(core) == number] for number in sorted(set(map(place, cores)))
        ]
        if fitting := [group for group in groups if len(group) >= wanted]:
            return min(fitting, key=len)
    return cores


def _require_cores(wanted: int, most: int, root: Path) -> None:
    if wanted < 1:
        raise UserError(f"--cores {wanted}: at least one core is needed")
    if wanted > most:
        physical = len({cpu.core for cpu in read_topology(root)})
        limit = f", of which affinity and cgroup leave us {most}" if most < physical else ""
        has = f"this machine has {physical} physical core{'s' if physical > 1 else ''}{limit}"
        raise UserError(f"--cores {wanted}: {has}; use --cores {most}{' or fewer' if most > 1 else ''}")


def _granted(cores: int, root: Path) -> int:
    """How many of so many cores a cgroup's quota lets work all the time."""
    quota = cpu_quota(root)
    return cores if quota is None else min(cores, max(1, math.floor(quota)))


def _fast_cores(cores: Sequence[LogicalCpu], root: Path) -> list[LogicalCpu]:
    """Those of `cores` that are of the fastest kind among them: all, unless the processor is a hybrid one."""
    speeds = _speeds([core.number for core in cores], root)
    fastest = max(speeds.values(), default=0.0)
    return [core for core in cores if speeds[core.number] >= ANOTHER_KIND * fastest]


def _speeds(cores: Sequence[int], root: Path) -> dict[int, float]:
    """How fast each core is, in a unit that is the same for all; alike where the kernel does not say."""
    devices = root / "sys/devices"
    performance = read_text(devices / "cpu_core/cpus")
    if performance and read_text(devices / "cpu_atom/cpus"):
        fast = set(numbers(performance))
        return {core: float(core in fast) for core in cores}
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        stated = [read_text(devices / f"system/cpu/cpu{core}" / name) for core in cores]
        if all(stated):
            return {core: float(value or 0) for core, value in zip(cores, stated, strict=True)}
    return dict.fromkeys(cores, 1.0)


def _nodes(root: Path) -> dict[int, int]:
    folder = root / "sys/devices/system/node"
    return {
        cpu: int(node.name.removeprefix("node"))
        for node in folder.glob("node[0-9]*")
        for cpu in numbers(read_text(node / "cpulist") or "")
    }
