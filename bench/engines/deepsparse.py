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
    # It compiles for prompts and for single tokens. Measured: 1.3 (LLaMA2-7B in int8) to 2.5 (SmolLM2-135M).
    loaded_bytes_per_byte=2.6,
    notes=("Retired in June 2025; 1.8.0 is its last release.",),
)
