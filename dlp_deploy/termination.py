"""Being asked to end: `kill`, `docker stop`, `timeout`, a cancelled CI job, a closed terminal.

Python dies of these signals on the spot, and every `with` is skipped: temporary folders stay behind, and
engines compute on. Here they end the program as Ctrl-C does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@dataclass
class Termination:
    """Which signal told the body of `termination_as_interrupt` to end, if one did."""

    told_by: signal.Signals | None = None


@contextmanager
def termination_as_interrupt() -> Iterator[Termination]:
    """The first SIGTERM or SIGHUP raises KeyboardInterrupt, with its name, in the body, and later ones leave
    it to its cleaning.

    Only where nobody else has a say: a signal that is ignored (as by nohup) or has a handler keeps what it
    has, and so do all of them outside the main thread, which alone gets signals.
    """
    found = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if found.told_by is None:
            found.told_by = signal.Signals(number)
            raise KeyboardInterrupt(found.told_by.name)

    ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield found
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
