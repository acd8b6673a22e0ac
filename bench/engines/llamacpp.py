from __future__ import annotations

from . import LOCKS, Engine

ENGINE = Engine(
    name="llamacpp",
    title="llama.cpp (xllamacpp 2026.10.11549)",
    worker="llamacpp",
    reads="llamacpp",
    model_file="model.gguf",
    precisions=("fp32", "int8", "int4"),
    licence="MIT",
    modules=("xllamacpp",),
    lock=LOCKS / "llamacpp.txt",
    pythons=((3, 11), (3, 12), (3, 13), (3, 10)),
    download_mb=51,
    notes=(
        "No sparse kernels: zeros cost as much as any other weight, so it serves as a dense baseline.",
        "The wheel is built for AVX2; a build of one's own may be faster where there is AVX-512 or VNNI.",
    ),
)
