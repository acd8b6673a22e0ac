"""Whether a model can be exported as asked, told from its config alone: before hours of pruning."""

from __future__ import annotations

from collections.abc import Collection

from ..families import Decoder
from ..models import ModelFiles, load_config
from ..outline import outline_of
from . import traced
from .deepsparse import DeepSparseTarget
from .gguf import require_known
from .onnxruntime import OnnxRuntimeTarget
from .plan import Graph
from .sensitivity import named_layers


def require_exportable(files: ModelFiles, graphs: Collection[Graph]) -> None:
    """Raise UserError for a model that an engine of `graphs` computes wrongly or does not take, and for
    patterns of layers to keep in fp32 that match none."""
    traced.require_exportable(files, graphs)
    config = load_config(files)
    outline = outline_of(config)
    for graph in graphs:
        if graph.grid is not None and graph.keep_fp32 not in ("none", "auto"):
            named_layers(graph.keep_fp32, outline.linear_groups())
        if not isinstance(outline, Decoder):
            continue
        if graph.engine == "deepsparse":
            DeepSparseTarget(outline, (), detach_output=False)
        elif graph.engine == "onnxruntime":
            OnnxRuntimeTarget(outline, ())
        else:
            require_known(outline, config)
