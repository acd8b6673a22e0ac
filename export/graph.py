"""Write an ONNX graph whose weights go straight to an external data file.

Nothing but the node list and small constants is held in memory, so a model of any size is exported
in the memory of its largest tensor. The protobuf itself stays far below its 2 GiB limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# A page: what an engine needs to map a tensor instead of copying it.
ALIGNMENT = 4096
# Smaller than this, a tensor stays in the protobuf: readers without external data support
# (and shape inference) need the constants of Reshape, Slice and the like.
INLINE_BYTES = 1024


class GraphWriter:
    """One ONNX model in the making, below `folder`.

    Values are the names of graph edges (str). `close` writes model.onnx; the data file grows with
    each call of `weight`.
    """

    def __init__(self, folder: Path, *, opset: int, ir_version: int, microsoft: bool = False) -> None:
        self.folder = folder
        self.opset = opset
        self.ir_version = ir_version
        self.microsoft = microsoft
        self.weight_bytes = 0
        # Edges that hold a whole tensor of the checkpoint, by its name, for those who can use them again.
        self.shared: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._names: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._data = (folder / DATA_FILE).open("wb")

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def node(self, operator: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output, called like the node, and return that output."""
        self.nodes(operator, inputs, (name,), name=name, domain=domain, **attributes)
        return name

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Add a node with any number of outputs; an empty name stands for one that is not wanted."""
        if name in self._names:
            raise ValueError(f"two nodes are called {name}")
        self._names.add(name)
        self._nodes.append(
            helper.make_node(operator, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )
        return tuple(outputs)

    def copy(self, node: onnx.NodeProto) -> None:
        """Add a node of another graph whose edges are all in this one."""
        self._nodes.append(node)

    def slice(self, x: str, start: int, end: int, *, axis: int, name: str) -> str:
        """x[start:end] along one axis."""
        bounds = (self.constant([value]) for value in (start, end, axis))
        return self.node("Slice", x, *bounds, name=name)

    def constant(self, value: np.ndarray | Sequence[int]) -> str:
        """A small constant, stored in the protobuf; equal ones are stored once."""
        array = np.ascontiguousarray(value, dtype=None if isinstance(value, np.ndarray) else np.int64)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers.append(onnx.numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def weight(self, name: str, array: np.ndarray) -> str:
        """Append `array` to the data file, and return the name of its initializer."""
        array = np.ascontiguousarray(array)
        self.weight_bytes += array.nbytes
        if array.nbytes < INLINE_BYTES:
            self._initializers.append(onnx.numpy_helper.from_array(array, name))
            return name
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        offset = self._data.tell()
        self._data.write(array.data.cast("B"))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, text in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=text)
        self._initializers.append(tensor)
        return name

    def close(self, description: str, metadata: Mapping[str, str] | None = None) -> Path:
        """Write model.onnx beside its data and return its path. OSError when the disk is full.

        `metadata` is for those who run the graph.
        """
        self._data.close()
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, self._initializers, doc_string=description
        )
        opsets = [helper.make_opsetid("", self.opset)]
        if self.microsoft:
            opsets.append(helper.make_opsetid("com.microsoft", 1))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="dlp-deploy"
        )
        helper.set_model_props(model, dict(metadata or {}))
        path = self.folder / MODEL_FILE
        path.write_bytes(model.SerializeToString())
        return path
