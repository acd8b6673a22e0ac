"""Run a command and see what it took, or talk to it while it runs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

DLP_DEPLOY = str(Path(sys.executable).with_name("dlp-deploy"))
POLL_SECONDS = 0.05


def measured(command: Sequence[str], children: bool = False) -> tuple[float, int]:
    """Wall time in seconds and peak resident memory in bytes of a command; ends the script if it fails.

    The memory is the command's own, without that of the processes that it starts, such as engines; with
    `children` it is that of the largest of them all.
    """
    start, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            started = psutil.Process(process.pid).children(recursive=True) if children else []
            peak = max(peak, *(_peak_of(one) for one in (process.pid, *(child.pid for child in started))))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start, peak


@contextmanager
def announced(command: Sequence[str], marker: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server, and the address that it writes in a line with `marker`; it is ended behind the body."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines.append(line)
                if marker in line:
                    break
            else:
                raise SystemExit(f"{' '.join(command)} ended before it served:\n{''.join(lines[-20:])}")
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield next(word for word in line.split() if word.startswith("http"))
        finally:
            process.terminate()


def _peak_of(pid: int) -> int:
    """The kernel's own high-water mark; 0 for a process that is ending."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
