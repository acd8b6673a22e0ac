"""What is known of the machine, of machines described by files and of this one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlp_deploy.bench.bandwidth import buffer_bytes, measure_bandwidth, pass_rates, rate_of_reading
from dlp_deploy.bench.cgroups import available_memory, cpu_quota, throttled_seconds
from dlp_deploy.bench.cores import choose_cores, read_topology
from dlp_deploy.bench.machine import cache_bytes, describe_machine, processor_time, require_avx2
from dlp_deploy.bench.peak import measure_peak
from dlp_deploy.bench.worker import WorkerError
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


@pytest.mark.parametrize(
    "stat", ["nr_throttled 3\nthrottled_usec 2500000", "nr_throttled 3\nthrottled_time 2500000000"]
)
def test_time_that_a_quota_took(tmp_path: Path, stat: str) -> None:
    root = server(tmp_path)
    assert throttled_seconds(root) == 0
    write(root / "sys/fs/cgroup/jobs/mine/cpu.stat", f"nr_throttled 3\n{stat}")
    assert throttled_seconds(root) == 2.5


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


@pytest.mark.parametrize(
    ("limit", "usage", "total"),
    [
        ("jobs/mine/memory.high", "jobs/mine/memory.current", ""),
        ("jobs/mine/memory.max", "jobs/mine/memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ],
)
def test_files_that_a_cgroup_caches_are_memory_to_be_had(
    limit: str, usage: str, total: str, tmp_path: Path
) -> None:
    root = server(tmp_path)
    write(root / "proc/self/cgroup", "4:memory:/\n0::/jobs/mine")
    folder = root / "sys/fs/cgroup"
    write(folder / limit, "8000000000")
    write(folder / usage, "7900000000")
    stat = f"anon 400000000\n{total}inactive_file 6000000000\n{total}active_file 1000000000\nshmem 0\n"
    write((folder / usage).with_name("memory.stat"), stat)
    assert available_memory(root) == 100_000_000 + 7_000_000_000


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


@pytest.mark.parametrize(
    ("files", "cpuinfo", "expected"),
    [
        ({"cpufreq/base_frequency": "2500000", "acpi_cppc/nominal_freq": "2400"}, "cpu MHz : 800", 2.5),
        # On bare metal an idle processor is slow, and its first one need not be the one that works.
        ({"acpi_cppc/nominal_freq": "2450"}, "cpu MHz : 400.0", 2.45),
        ({"acpi_cppc/nominal_freq": "0"}, "model name : Xeon 6248R CPU @ 3.00GHz\ncpu MHz : 1000", 3.0),
        ({}, "cpu MHz : 400.0\n\nprocessor : 1\ncpu MHz : 3250.4", 3.25),
        ({}, "model name : EPYC", None),
    ],
)
def test_the_clock_is_that_of_work_and_not_of_an_idle_processor(
    tmp_path: Path, files: dict[str, str], cpuinfo: str, expected: float | None
) -> None:
    root = server(tmp_path)
    for name, text in files.items():
        write(root / "sys/devices/system/cpu/cpu0" / name, text)
    write(root / "proc/cpuinfo", cpuinfo)
    assert describe_machine(root).clock_ghz == expected


def test_caches_that_cores_share_count_once(tmp_path: Path) -> None:
    """Eight cores in two groups, as EPYC has them: a third level for each group, a second for each core."""
    for number in range(8):
        group = "0-3" if number < 4 else "4-7"
        levels = ((1, "Data", "32K", str(number)), (2, "Unified", "512K", str(number)))
        for index, (level, kind, size, shared) in enumerate((*levels, (3, "Unified", "32M", group))):
            cache = tmp_path / f"sys/devices/system/cpu/cpu{number}/cache/index{index}"
            write(cache / "level", str(level))
            write(cache / "type", kind)
            write(cache / "size", size)
            write(cache / "shared_cpu_list", shared)
    assert cache_bytes(range(8), tmp_path) == (64 << 20) + (4 << 20)
    assert cache_bytes([0, 1], tmp_path) == (32 << 20) + (1 << 20)
    assert cache_bytes([3, 4], tmp_path) == (64 << 20) + (1 << 20)
    assert cache_bytes([9], tmp_path) == 0


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
    assert 1 <= len(cores) <= machine.usable_cores <= machine.physical_cores <= len(read_topology())
    assert 0 < available_memory() <= machine.memory_bytes
    with pytest.raises(UserError, match=f"this machine has {machine.physical_cores} physical core"):
        choose_cores(10_000)


def test_bandwidth_is_that_of_memory_in_bytes_a_second() -> None:
    """Between a machine that is all but stopped and one that there is none of."""
    assert 1e6 < measure_bandwidth(choose_cores(1), cache_bytes=0, available_bytes=1 << 30) < 1e13


@pytest.mark.parametrize("threads", [1, 2])
def test_the_rate_is_that_of_all_threads_in_the_fastest_way_of_reading(threads: int) -> None:
    """Each thread has a clock of its own, which only reading moves on."""
    now = threading.local()

    def clock() -> float:
        return float(getattr(now, "seconds", 0.0))

    def at_rate(bytes_per_second: float) -> Callable[[np.ndarray], None]:
        def read(data: np.ndarray) -> None:
            now.seconds = clock() + data.nbytes / bytes_per_second

        return read

    found = rate_of_reading(choose_cores(1) * threads, 1 << 20, [at_rate(2e9), at_rate(5e9)], clock)
    assert found == pytest.approx(threads * 5e9)


def test_more_is_read_than_all_caches_hold_and_enough_by_each_core() -> None:
    gib = 1 << 30
    assert buffer_bytes(2, 33 << 20, 64 * gib) == 256 << 20
    assert buffer_bytes(2, 200 << 20, 64 * gib) == 800 << 20
    assert buffer_bytes(24, 60 << 20, 64 * gib) == 24 * (64 << 20)
    assert buffer_bytes(64, 288 << 20, 512 * gib) == 4 * gib
    assert buffer_bytes(64, 288 << 20, 4 * gib) == gib


def test_a_pass_lasts_from_the_first_thread_that_began_to_the_last_that_ended() -> None:
    spans = np.array([[[0.0, 2.0], [10.0, 11.0]], [[1.5, 3.5], [10.0, 12.0]], [[0.5, 4.0], [10.5, 11.0]]])
    assert pass_rates(spans, 800).tolist() == [200, 400]


@pytest.mark.parametrize(
    ("program", "measured"),
    [
        ("bandwidth", lambda core: measure_bandwidth([core], cache_bytes=0, available_bytes=1 << 30)),
        ("peak", lambda core: measure_peak([core])),
    ],
)
def test_a_measuring_program_imports_from_where_we_do_and_fails_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, measured: Callable[[int], object]
) -> None:
    """NumPy may be in a user's own folder, or on PYTHONPATH: here there is one that says so."""
    write(tmp_path / "numpy" / "__init__.py", "raise ImportError('numpy of the path')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = rf"^this machine could not be measured \({program}\): ImportError: numpy of the path$"
    with pytest.raises(WorkerError, match=told):
        measured(*choose_cores(1))


def test_files_of_the_folder_we_are_in_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "statistics.py", "raise ImportError('statistics of this folder')")
    write(tmp_path / "numpy.py", "raise ImportError('numpy of this folder')")
    monkeypatch.chdir(tmp_path)
    assert measure_bandwidth(choose_cores(1), cache_bytes=0, available_bytes=1 << 26) > 0
