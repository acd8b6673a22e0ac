"""A model of a real shape with random weights: as fast as the real one, and every tensor made when asked for.

How fast a graph runs depends on its shapes and on where its zeros are, not on the other values. Weights
are normal with the standard deviation that such models are initialized with, so that logits stay finite;
the smallest go, which is magnitude pruning and here the same as a random mask.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ..artifact import EngineName, Precision
from ..blocks import logits_of
from ..checkpoint import Checkpoint, StoredTensor
from ..export.decoder import Weights
from ..export.grid import Grid
from ..export.plan import GGUF_BLOCK, Graph
from ..export.reference import Reference
from ..export.write import Written, write_graph
from ..families import Decoder, decoder_of
from ..models import ModelFiles
from ..progress import progress

STANDARD_DEVIATION = 0.02
# Coarse blocks of MatMulNBits are the fast ones; fine ones are more accurate, which random weights are not.
FAST_BLOCK = 128


@dataclass(frozen=True)
class RandomModel:
    """`config` is a transformers config; of the linear layers of its blocks the share `sparsity` is zero.

    `block_size` weights share a scale in the quantized graphs for ONNX Runtime.
    """

    config: Any
    sparsity: float
    seed: int
    block_size: int = FAST_BLOCK

    @property
    def decoder(self) -> Decoder:
        return decoder_of(self.config)

    def checkpoint(self) -> Checkpoint:
        """Its weights, float32, the same at each reading; none is kept in memory."""
        return Checkpoint(dict(self._tensors()), "random weights")

    def write(self, folder: Path, engine: EngineName, precision: Precision) -> Written:
        """Write its graph for an engine below `folder`.

        Int8 graphs take the scale of each token's activations as they run, so nothing is calibrated; and
        nothing is smoothed, as random weights have no outlier channels. Both graphs hold the same
        operators as those of a real model.
        """
        graph = self._graph(engine, precision, folder.name)
        weights = Weights(self.checkpoint(), self.decoder)
        with progress(f"Writing {graph.label}", self.decoder.blocks) as advance:
            return write_graph(folder, graph, weights, self.decoder, self.config, advance)

    def grid_block(self, engine: EngineName, precision: Precision) -> int | None:
        """How many inputs share a scale in that graph; None for all, and in fp32."""
        grid = self._graph(engine, precision, "").grid
        return grid.block if grid else None

    def _graph(self, engine: EngineName, precision: Precision, folder: str) -> Graph:
        options: dict[str, Any] = {"rounding": "nearest", "block_size": self.block_size, "smooth": False}
        return Graph(engine, precision, self.sparsity == 0, folder, **options)

    def reference(self, folder: Path, ids: np.ndarray, prompt: int) -> Reference:
        """What fp32 torch says of it after ids int64 [n]: after the prompt and after each later token.

        `folder` gets its config.json.
        """
        self.config.save_pretrained(folder)
        files = ModelFiles("random", "random weights", folder)
        (logits,) = logits_of(files, torch.from_numpy(ids)[None], checkpoint=self.checkpoint())
        return Reference(ids, prompt, logits[prompt - 1 :].numpy())

    def _tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        decoder = self.decoder
        family, blocks = decoder.family, range(decoder.blocks)
        pruned = {f"{family.block(i)}.{layer}.weight" for i in blocks for layer in family.linears}
        for name, shape in parameter_shapes(self.config).items():
            sparsity = self.sparsity if name in pruned else 0.0
            read = partial(_tensor, name, shape, sparsity, self.seed)
            yield name, StoredTensor(shape, torch.float32, Path(name), read)


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model; a tied head is not among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    decoder = decoder_of(config)
    if decoder.tied_embeddings:
        shapes.pop(f"{decoder.family.head}.weight", None)
    return shapes


def graph_bytes(config: Any, engine: EngineName, precision: Precision, block_size: int = FAST_BLOCK) -> int:
    """About how many bytes the graph of a model takes."""
    decoder, grid = decoder_of(config), Graph(engine, precision, True, "", block_size=block_size).grid
    table = decoder.vocabulary * decoder.hidden
    weights = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    products = weights if decoder.tied_embeddings else weights - table
    if engine == "llamacpp":
        return _gguf_bytes(grid, weights, table, products)
    if grid is None:
        # A tied table is stored once where the engine reads it as head too.
        shared = engine == "onnxruntime" and decoder.tied_embeddings
        return 4 * (products if shared else table + products)
    # DeepSparse knows no container smaller than int8.
    per_weight = 1.0 if engine == "deepsparse" else grid.bits / 8 + 4 / block_size
    return round(4 * table + per_weight * products)


def _gguf_bytes(grid: Grid | None, weights: int, table: int, products: int) -> int:
    """A tied table is stored once, but beside 4 bit products in 8 bits; scales are float16."""
    if grid is None:
        return 4 * weights
    scale = 2 / GGUF_BLOCK
    return round((1 + scale) * weights if grid.bits == 8 else (1 + scale) * table + (0.5 + scale) * products)


def _tensor(name: str, shape: tuple[int, ...], sparsity: float, seed: int) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    weight = torch.empty(shape).normal_(std=STANDARD_DEVIATION, generator=generator)
    if sparsity:
        least = STANDARD_DEVIATION * NormalDist().inv_cdf((1 + sparsity) / 2)
        weight.masked_fill_(weight.abs() < least, 0)
    return weight
