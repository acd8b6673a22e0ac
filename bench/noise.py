"""What disturbed a measurement: other work on its cores, on their siblings and beside them, and time that a
hypervisor or a cgroup's quota took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

from .cgroups import throttled_seconds
from .cores import cores_beside, siblings_of
from .machine import processor_time
from .report import NoiseRecord


@dataclass
class Noise:
    """Seconds, summed over hardware threads, while a run was timed.

    `core_s` is all the time of the run's cores; `others_s` what of it other processes used, which is below
    zero where the run worked outside of its cores; `siblings_s` what ran on their sibling threads;
    `beside_core_s` all the time of the machine's other cores, and `beside_s` what of it was used.
    """

    core_s: float = 0.0
    stolen_s: float = 0.0
    others_s: float = 0.0
    siblings_s: float = 0.0
    beside_core_s: float = 0.0
    beside_s: float = 0.0
    throttled_s: float = 0.0

    def __add__(self, other: Noise) -> Noise:
        return Noise(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Noise)))

    def record(self) -> NoiseRecord:
        def share(seconds: float, of: float) -> float:
            return seconds / of if of else 0.0

        return NoiseRecord(
            core_s=self.core_s,
            stolen_share=share(self.stolen_s, self.core_s),
            others_share=share(self.others_s, self.core_s),
            siblings_share=share(self.siblings_s, self.core_s),
            beside_share=share(self.beside_s, self.beside_core_s),
            throttled_share=share(self.throttled_s, self.core_s),
        )


@dataclass
class Watch:
    """Watches the processor around timed work on `cores`."""

    cores: Sequence[int]
    siblings: Sequence[int] = field(init=False)
    beside: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.siblings, self.beside = siblings_of(self.cores), cores_beside(self.cores)

    @contextmanager
    def __call__(self, own_s: Callable[[], float]) -> Iterator[Noise]:
        """A Noise that is filled in at the end of the block; `own_s` is the processor time of the run."""
        noise = Noise()
        own, before = own_s(), self._readings()
        yield noise
        after, used = self._readings(), own_s() - own
        wall, busy, stolen, siblings, beside, throttled = (
            late - early for early, late in zip(before, after, strict=True)
        )
        noise.core_s, noise.stolen_s = wall * len(self.cores), stolen
        # Counted in ticks of 10 ms on both sides: on a quiet machine the difference scatters around zero.
        noise.others_s = busy - used
        noise.siblings_s, noise.throttled_s = siblings, throttled
        noise.beside_core_s, noise.beside_s = wall * len(self.beside), beside

    def _readings(self) -> tuple[float, ...]:
        own = processor_time(self.cores)
        others = [processor_time(cpus)["busy"] for cpus in (self.siblings, self.beside)]
        return time.perf_counter(), own["busy"], own["stolen"], *others, throttled_seconds()
