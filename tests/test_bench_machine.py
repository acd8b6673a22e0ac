"""Cores are chosen as a careful person would, on machines described by files and on this one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from dlp_deploy.bench.bandwidth import measure_bandwidth
from dlp_deploy.bench.machine import (
    available_memory,
    choose_cores,
    cores_beside,
    cpu_quota,
    describe_machine,
    nodes_of,
    processor_time,
    read_topology,
    require_avx2,
    siblings_of,
    throttled_seconds,
)
from dlp_deploy.errors import UserError

FLAGS = "fpu avx avx2 avx512f avx512_vnni hypervisor"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def server(root: Path, flags: str = FLAGS) -> Path:
    """Two sockets of four cores with two hardware threads each, numbered as Linux does: 0-7 are the first
    threads, 8-15 their siblings; even numbers are on socket 0."""
    cpu = root / "sys/devices/system/cpu"
    write(cpu / "online", "0-15")
    for number in range(16):
        first = number % 8
        write(cpu / f"cpu{number}/topology/core_cpus_list", f"{first},{first + 8}")
        write(cpu / f"cpu{number}/topology/physical_package_id", str(first % 2))
    for node in (0, 1):
        cpus = ",".join(str(number) for number in range(16) if number % 2 == node)
        write(root / f"sys/devices/system/node/node{node}/cpulist", cpus)
    for index, (level, kind, size) in enumerate(
        ((1, "Data", "32K"), (2, "Unified", "1M"), (3, "Unified", "35M"))
    ):
        cache = cpu / f"cpu0/cache/index{index}"
        write(cache / "level", str(level))
        write(cache / "type", kind)
        write(cache / "size", size)
    write(cpu / "cpu0/cpufreq/scaling_governor", "performance")
    write(
        root / "proc/cpuinfo",
        f"processor\t: 0\nmodel name\t: Xeon Gold\nflags\t\t: {flags}\n\nprocessor\t: 1",
    )
    write(root / "proc/meminfo", "MemTotal:       64000000 kB\nMemAvailable:   60000000 kB")
    write(root / "proc/self/cgroup", "0::/jobs/mine")
    return root


def test_one_hardware_thread_per_core_and_one_node_before_the_next(tmp_path: Path) -> None:
    root = server(tmp_path)
    assert choose_cores(None, root, range(16)) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert choose_cores(3, root, range(16)) == (0, 2, 4)
    assert choose_cores(5, root, range(16)) == (0, 2, 4, 6, 1)


def test_one_node_that_holds_all_before_two(tmp_path: Path) -> None:
    root = server(tmp_path)
    # One core of node 0 and four of node 1 are left to us.
    lopsided = {0, 1, 3, 5, 7}
    assert choose_cores(1, root, lopsided) == (0,)
    assert choose_cores(3, root, lopsided) == (1, 3, 5)
    assert choose_cores(5, root, lopsided) == (1, 3, 5, 7, 0)
    assert nodes_of((1, 3, 5), root) == (1,)
    assert nodes_of((1, 3, 5, 7, 0), root) == (0, 1)


def test_siblings_and_the_cores_beside(tmp_path: Path) -> None:
    root = server(tmp_path)
    assert siblings_of((0, 10), root) == (2, 8)
    assert cores_beside((0, 10), root) == (1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15)


@pytest.mark.parametrize(
    "stat", ["nr_throttled 3\nthrottled_usec 2500000", "nr_throttled 3\nthrottled_time 2500000000"]
)
def test_time_that_a_quota_took(tmp_path: Path, stat: str) -> None:
    root = server(tmp_path)
    assert throttled_seconds(root) == 0
    write(root / "sys/fs/cgroup/jobs/mine/cpu.stat", f"nr_throttled 3\n{stat}")
    assert throttled_seconds(root) == 2.5


def test_affinity_is_respected_and_siblings_stand_in(tmp_path: Path) -> None:
    root = server(tmp_path)
    assert choose_cores(None, root, {1, 9, 10, 12}) == (10, 12, 1)


def test_too_many_cores_is_an_error_that_says_how_many_there_are(tmp_path: Path) -> None:
    root = server(tmp_path)
    with pytest.raises(
        UserError, match=r"--cores 24: this machine has 8 physical cores; use --cores 8 or fewer"
    ):
        choose_cores(24, root, range(16))
    with pytest.raises(
        UserError, match="8 physical cores, of which affinity and cgroup leave us 2; use --cores 2"
    ):
        choose_cores(3, root, {0, 8, 3})
    with pytest.raises(UserError, match="--cores 0"):
        choose_cores(0, root, range(16))


@pytest.mark.parametrize(
    ("folder", "quota", "cores"),
    [("sys/fs/cgroup/jobs/mine", "350000 100000", 3), ("sys/fs/cgroup/jobs", "50000 100000", 1)],
)
def test_the_quota_of_a_cgroup_or_its_parent_limits(
    tmp_path: Path, folder: str, quota: str, cores: int
) -> None:
    root = server(tmp_path)
    write(root / "sys/fs/cgroup/jobs/mine/cpu.max", "max 100000")
    write(root / folder / "cpu.max", quota)
    assert len(choose_cores(None, root, range(16))) == cores
    with pytest.raises(UserError, match=f"use --cores {cores}"):
        choose_cores(8, root, range(16))


def test_the_quota_of_an_old_cgroup_limits_too(tmp_path: Path) -> None:
    root = server(tmp_path)
    write(root / "proc/self/cgroup", "3:cpu,cpuacct:/mine\n0::/")
    write(root / "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_quota_us", "250000")
    write(root / "sys/fs/cgroup/cpu,cpuacct/mine/cpu.cfs_period_us", "100000")
    assert cpu_quota(root) == 2.5


def test_without_limits_there_is_no_quota(tmp_path: Path) -> None:
    root = server(tmp_path)
    write(root / "sys/fs/cgroup/jobs/mine/cpu.max", "max 100000")
    write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert cpu_quota(root) is None


def test_memory_is_what_the_cgroup_leaves(tmp_path: Path) -> None:
    root = server(tmp_path)
    assert available_memory(root) == 60000000 * 1024
    write(root / "sys/fs/cgroup/jobs/mine/memory.max", "8000000000")
    write(root / "sys/fs/cgroup/jobs/mine/memory.current", "3000000000")
    assert available_memory(root) == 5_000_000_000


def test_the_description_of_a_machine(tmp_path: Path) -> None:
    machine = describe_machine(server(tmp_path))
    assert machine.cpu == "Xeon Gold"
    assert machine.isa == ("avx2", "avx512f", "avx512_vnni")
    assert (machine.sockets, machine.numa_nodes, machine.physical_cores, machine.logical_cores) == (
        2,
        2,
        8,
        16,
    )
    assert machine.caches == {"L1d": 32 << 10, "L2": 1 << 20, "L3": 35 << 20}
    assert machine.governor == "performance"
    assert machine.hypervisor


def test_a_processor_without_avx2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Xeon Gold has no AVX2"):
        require_avx2(server(tmp_path, flags="fpu sse4_2 avx"))
    require_avx2(server(tmp_path))


def test_time_of_the_chosen_threads_only(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    lines = ["cpu 9 9 9 9 9 9 9 9 0 0", "cpu0 100 0 50 900 7 0 0 20 0 0", "cpu1 11 0 0 0 0 0 0 3 0 0"]
    write(tmp_path / "proc/stat", "\n".join(lines))
    assert processor_time([0], tmp_path) == {"busy": 150 / tick, "stolen": 20 / tick}


def test_this_machine() -> None:
    machine = describe_machine()
    cores = choose_cores(None)
    assert set(cores) <= os.sched_getaffinity(0)
    assert len(cores) == machine.usable_cores <= machine.physical_cores <= len(read_topology())
    assert 0 < available_memory() <= machine.memory_bytes
    with pytest.raises(UserError, match=f"this machine has {machine.physical_cores} physical core"):
        choose_cores(10_000)


def test_bandwidth_is_that_of_memory_and_no_more() -> None:
    """One thread copies memory at some rate: reading it alone is between a third of that and many times."""
    found = measure_bandwidth(choose_cores(1), cache_bytes=0, available_bytes=available_memory())
    source = np.ones(1 << 25)
    target = np.empty_like(source)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    assert best / 3 < found < 10 * best
