"""Time that a run may take, over all its resumptions."""

from __future__ import annotations

import time


class Clock:
    """Seconds spent since a run began; `before` are those of its interrupted earlier parts.

    `limit` (None: none) is for the whole run. `reserve` of it are needed for what comes after training;
    it is set once that is known.
    """

    def __init__(self, limit: float | None, before: float = 0.0) -> None:
        self.limit = limit
        self.reserve = 0.0
        self._began = time.monotonic() - before

    def spent(self) -> float:
        return time.monotonic() - self._began

    def share(self) -> float:
        """How much of the time for training is spent, from 0; 0 for a run without a limit."""
        if self.limit is None:
            return 0.0
        return self.spent() / max(self.limit - self.reserve, 1e-9)
