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
    notes=("No sparse kernels: zeros cost as much as any other weight.",),
)
