from __future__ import annotations

from . import LOCKS, Engine

ENGINE = Engine(
    name="llmcompressor",
    title="llm-compressor 0.14.0",
    worker="",
    reads="recipe.yaml",
    precisions=(),
    licence="Apache-2.0",
    modules=("torch", "llmcompressor"),
    lock=LOCKS / "llmcompressor.txt",
    before=LOCKS / "torch.txt",
    pythons=((3, 11), (3, 10)),
    download_mb=400,
    notes=("Runs recipes; it does not decode.",),
)
