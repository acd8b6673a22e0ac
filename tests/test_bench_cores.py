"""Cores are chosen as a careful person would, on machines described by files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlp_deploy.bench.cores import (
    choose_cores,
    cores_beside,
    nodes_of,
    nodes_with_memory,
    siblings_of,
    usable_cores,
)
from dlp_deploy.errors import UserError

from .test_bench_machine import server, write


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


def server_of_many_nodes(root: Path, cores: int = 4) -> Path:
    """Two sockets of two NUMA nodes each, numbered node by node; no hyper-threads."""
    cpu = root / "sys/devices/system/cpu"
    write(cpu / "online", f"0-{4 * cores - 1}")
    for node in range(4):
        first, last = node * cores, (node + 1) * cores - 1
        write(root / f"sys/devices/system/node/node{node}/cpulist", f"{first}-{last}")
        for number in range(first, last + 1):
            write(cpu / f"cpu{number}/topology/core_cpus_list", str(number))
            write(cpu / f"cpu{number}/topology/physical_package_id", str(node // 2))
    return root


def test_what_one_node_does_not_hold_is_kept_on_one_socket(tmp_path: Path) -> None:
    root = server_of_many_nodes(tmp_path)
    # A node of each socket has lost a core: the two largest nodes are apart.
    allowed = set(range(16)) - {0, 12}
    assert choose_cores(5, root, allowed) == (4, 5, 6, 7, 1)
    assert nodes_of(choose_cores(7, root, allowed), root) == (0, 1)
    assert choose_cores(8, root, allowed) == (4, 5, 6, 7, 8, 9, 10, 11)
    assert len(choose_cores(None, root, allowed)) == 14


def test_nodes_without_memory_come_last(tmp_path: Path) -> None:
    """As on a Threadripper of four dies, two of which have no memory of their own."""
    root = server_of_many_nodes(tmp_path)
    write(root / "sys/devices/system/node/has_memory", "1,3")
    assert nodes_with_memory(root) == (1, 3)
    assert choose_cores(4, root, range(16)) == (4, 5, 6, 7)
    assert nodes_of(choose_cores(8, root, range(16)), root) == (1, 3)
    assert choose_cores(10, root, range(16))[:8] == (4, 5, 6, 7, 12, 13, 14, 15)
    # Affinity may leave nothing else.
    assert choose_cores(2, root, range(4)) == (0, 1)


def test_nodes_whose_memory_a_cpuset_withholds_come_last(tmp_path: Path) -> None:
    root = server(tmp_path)
    assert nodes_with_memory(root) == (0, 1)
    write(root / "sys/devices/system/node/has_memory", "0-1")
    write(root / "proc/self/status", "Name:\tbench\nMems_allowed:\t2\nMems_allowed_list:\t1")
    assert nodes_with_memory(root) == (1,)
    assert choose_cores(2, root, range(16)) == (1, 3)


def hybrid(root: Path, speeds: dict[str, tuple[int, int]], pmu: bool) -> Path:
    """A laptop: two fast cores with two threads each, 0-3, and four slow ones, 4-7. `speeds` are what files
    below each thread's folder say of a fast and of a slow one."""
    cpu = root / "sys/devices/system/cpu"
    write(cpu / "online", "0-7")
    for number in range(8):
        siblings = f"{number - number % 2}-{number - number % 2 + 1}" if number < 4 else str(number)
        write(cpu / f"cpu{number}/topology/core_cpus_list", siblings)
        for name, (fast, slow) in speeds.items():
            write(cpu / f"cpu{number}" / name, str(fast if number < 4 else slow))
    if pmu:
        write(root / "sys/devices/cpu_core/cpus", "0-3")
        write(root / "sys/devices/cpu_atom/cpus", "4-7")
    return root


@pytest.mark.parametrize(
    ("speeds", "pmu"),
    [
        ({}, True),
        ({"cpu_capacity": (1024, 620)}, False),
        ({"cpufreq/cpuinfo_max_freq": (4_800_000, 3_700_000)}, False),
    ],
)
def test_of_a_hybrid_processor_the_fast_cores_are_used(
    tmp_path: Path,
    speeds: dict[str, tuple[int, int]],
    pmu: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = hybrid(tmp_path, speeds, pmu)
    assert choose_cores(None, root, range(8)) == (0, 2)
    told = " ".join(capsys.readouterr().err.split())
    assert "Using the 2 fast cores; slower ones would set the pace (--cores 6 takes them too)" in told
    assert choose_cores(2, root, range(8)) == (0, 2)
    assert capsys.readouterr().err == ""
    assert choose_cores(4, root, range(8)) == (0, 2, 4, 5)
    assert "--cores 4: 2 of them are slower cores" in capsys.readouterr().err
    assert usable_cores(root, range(8)) == 6
    # Where affinity leaves slow cores alone, they are what there is.
    assert choose_cores(None, root, range(4, 8)) == (4, 5, 6, 7)


def test_favoured_cores_are_no_kind_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = hybrid(tmp_path, {"cpufreq/cpuinfo_max_freq": (5_800_000, 5_500_000)}, pmu=False)
    assert choose_cores(None, root, range(8)) == (0, 2, 4, 5, 6, 7)
    assert capsys.readouterr().err == ""


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
