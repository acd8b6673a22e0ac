"""Programs that measure the machine: modules of this package, each run in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from .worker import WorkerError

# As `python -m`, but for the folder that it is started in, whose files would come before all libraries.
_START = (
    "import runpy, sys; sys.path[:] = filter(None, sys.path); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def ask(module: str, cores: Sequence[int], *arguments: str) -> list[float]:
    """The numbers that `module` prints when it is run with `cores` (as 0,2,4) and `arguments`.

    It imports from where we do, a user's own folder and PYTHONPATH too. Raises WorkerError, one line, when
    it fails.
    """
    command = [sys.executable, "-c", _START, module, ",".join(map(str, cores)), *arguments]
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with status {done.returncode}"]
        raise WorkerError(f"this machine could not be measured ({module.rpartition('.')[2]}): {last[0]}")
    return [float(number) for number in done.stdout.split()]
