from __future__ import annotations

from . import LOCKS, Engine

ENGINE = Engine(
    name="sparseml",
    title="SparseML 1.8.0",
    worker="",
    reads="recipe.yaml",
    precisions=(),
    licence="Apache-2.0",
    modules=("torch", "sparseml.transformers"),
    lock=LOCKS / "sparseml.txt",
    before=LOCKS / "torch.txt",
    pythons=((3, 11), (3, 10)),
    download_mb=400,
    notes=("Runs recipes; it does not decode. Retired in June 2025; 1.8.0 is its last release.",),
)
