from __future__ import annotations

from . import Engine

ENGINE = Engine(
    name="onnxruntime",
    title="ONNX Runtime",
    worker="onnxruntime",
    reads="onnxruntime",
    precisions=("fp32", "int8", "int4"),
    licence="MIT",
    modules=("onnxruntime",),
    # Measured: 1.04 (TinyLlama in fp32) to 1.4 (SmolLM2-135M in int8).
    loaded_bytes_per_byte=1.5,
    notes=("No sparse kernels: zeros cost as much as any other weight.",),
)
