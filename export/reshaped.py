"""Undo what DeepSparse's own pipelines, server and benchmark do to the graph that they load.

They write the shapes they were started with into model.onnx, in place; its weights are untouched. An
artifact that was used that way is still whole, once the names of the dimensions are back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ..storage import atomic_path, sha256_file

# Names that dlp_deploy.export.deepsparse gives to the dimensions of its inputs.
BATCH = "batch"
DIMENSIONS = {
    "input_ids": {1: "tokens"},
    "positions": {1: "tokens"},
    "attention_mask": {1: "length"},
    "causal_mask": {2: "tokens", 3: "length"},
}
PAST = {2: "past"}


def restore_graph(path: Path, sha256: str) -> bool:
    """Whether the graph at `path` has this digest, if need be after putting its dimensions back.

    A graph that has been altered in any other way is left as it is.
    """
    if sha256_file(path) == sha256:
        return True
    data = _with_named_dimensions(path)
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        return False
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return True


def _with_named_dimensions(path: Path) -> bytes | None:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return None
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        for axis, name in {0: BATCH, **DIMENSIONS.get(value.name, PAST)}.items():
            if axis < len(dimensions):
                dimensions[axis].dim_param = name
    return model.SerializeToString()
