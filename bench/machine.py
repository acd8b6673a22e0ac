"""The machine: what its processor can do, and how busy it is.

Everything is read from /proc and /sys below `root`, so that other machines can be described in tests.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .cgroups import cpu_quota
from .cores import read_topology, usable_cores
from .kernel_files import ROOT, memory_bytes, read_text

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
        governor=read_text(root / f"sys/devices/system/cpu/cpu{cpus[0].number}/cpufreq/scaling_governor"),
        clock_ghz=_clock_ghz(root, cpus[0].number, info),
        hypervisor="hypervisor" in flags,
        memory_bytes=memory_bytes(root)["MemTotal"],
        kernel=platform.release(),
        operating_system=_os_name(root),
    )


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


def _clock_ghz(root: Path, cpu: int, info: Mapping[str, str]) -> float | None:
    """The base clock, as the kernel, the firmware or the processor's name says it; or else the highest at
    which any processor runs now: that of an idle one is lower."""
    folder = root / f"sys/devices/system/cpu/cpu{cpu}"
    for name, per_ghz in (("cpufreq/base_frequency", 1e6), ("acpi_cppc/nominal_freq", 1e3)):
        if frequency := int(read_text(folder / name) or 0):
            return round(frequency / per_ghz, 3)
    if named := re.search(r"@ ([\d.]+) ?GHz", info.get("model name", "")):
        return float(named[1])
    present = re.findall(r"^cpu MHz\s*: ([\d.]+)", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return round(max(map(float, present)) / 1000, 3) if present else None


def _caches_of(root: Path, cpu: int) -> Iterator[_Cache]:
    """The caches that hardware thread `cpu` uses."""
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
        level, kind, size = (read_text(index / name) for name in ("level", "type", "size"))
        if level and kind and size:
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            shared_by = read_text(index / "shared_cpu_list") or str(cpu)
            yield _Cache(int(level), f"L{level}{suffix}", _bytes(size), shared_by)


def _bytes(size: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1])
    return int(size[:-1]) * factor if factor else int(size)


def _cpuinfo(root: Path) -> dict[str, str]:
    """The entry of the first processor in /proc/cpuinfo."""
    first = (read_text(root / "proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _os_name(root: Path) -> str:
    for line in (read_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return platform.system()


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
    for line in (read_text(root / "proc/stat") or "").splitlines():
        name, *counts = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, counts[:8])
            busy += user + nice + system + irq + softirq
            stolen += steal
    return {"busy": busy / tick, "stolen": stolen / tick}
