from __future__ import annotations

from . import LOCKS, Engine

ENGINE = Engine(
    name="deepsparse",
    title="DeepSparse 1.8.0",
    worker="deepsparse",
    reads="deepsparse",
    precisions=("fp32", "int8", "int4"),
    licence="Neural Magic DeepSparse Community License (not open source)",
    modules=("deepsparse",),
    lock=LOCKS / "deepsparse.txt",
    pythons=((3, 11), (3, 10), (3, 9)),
    download_mb=190,
    skips_zeros=True,
    notes=("Retired in June 2025; 1.8.0 is its last release.",),
)
