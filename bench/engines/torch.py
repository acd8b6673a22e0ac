from __future__ import annotations

from . import Engine

ENGINE = Engine(
    name="torch",
    title="PyTorch (reference)",
    worker="torch",
    reads="checkpoint",
    precisions=("fp32",),
    licence="BSD-3-Clause",
    modules=("torch", "transformers"),
)
