"""Rotary position embedding (RoPE, arXiv 2104.09864): its tables, and the rotation in primitive operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..families import Decoder, rope_settings
from .graph import GraphWriter


@dataclass(frozen=True)
class Tables:
    """Cosine and sine of the rotary angles, float32 [positions, rotary_dim / 2].

    `label` tells apart the tables of one model.
    """

    label: str
    cosine: np.ndarray
    sine: np.ndarray


def tables_by_block(config: Any, decoder: Decoder, positions: int) -> tuple[Tables | None, ...]:
    """The tables of each block, shared by blocks with equal ones; None where nothing is rotated."""
    if not decoder.rotary_dim:
        return (None,) * decoder.blocks
    cosine, sine = rotary_tables(config, decoder, positions)
    everywhere = Tables("rotary", cosine, sine)
    if decoder.local_theta is None:
        return (everywhere,) * decoder.blocks
    local = Tables("rotary.local", *_tables(_frequencies(decoder, decoder.local_theta), 1.0, positions))
    return tuple(everywhere if window is None else local for window in decoder.windows)


def rotary_tables(config: Any, decoder: Decoder, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angles that a config asks for, float32 [positions, rotary_dim / 2].

    Scaled variants (Llama 3, linear, YaRN, ...) come from transformers' own table of them. Those whose
    angles depend on the length of the text (dynamic, LongRoPE) have them for texts of up to
    `decoder.max_positions`, within which they are constant.
    """
    return _tables(*frequencies(config, decoder), positions)


def frequencies(config: Any, decoder: Decoder) -> tuple[torch.Tensor, float]:
    """Angle per position, [rotary_dim / 2], and what cosine and sine are multiplied by."""
    kind = rope_settings(config)["rope_type"]
    if kind == "default":
        return unscaled_frequencies(config, decoder), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=decoder.max_positions)


def unscaled_frequencies(config: Any, decoder: Decoder) -> torch.Tensor:
    return _frequencies(decoder, rope_theta(config))


def rope_theta(config: Any) -> float:
    return rope_settings(config).get("rope_theta", getattr(config, "rope_theta", 10000.0))


def _frequencies(decoder: Decoder, theta: float) -> torch.Tensor:
    exponents = torch.arange(0, decoder.rotary_dim, 2, dtype=torch.int64).float() / decoder.rotary_dim
    return 1.0 / (theta**exponents)


def _tables(frequencies: torch.Tensor, scale: float, positions: int) -> tuple[np.ndarray, np.ndarray]:
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies.float())
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()


def gather_rows(graph: GraphWriter, tables: Tables, positions: str, heads_axis: int) -> tuple[str, str]:
    """Cosine and sine at each token's position, of all rotated channels, with an axis of 1 for the heads."""
    rows = []
    for name, half in (("cosine", tables.cosine), ("sine", tables.sine)):
        table = graph.weight(f"{tables.label}.{name}", np.tile(half, 2))
        row = graph.node("Gather", table, positions, name=f"{tables.label}.{name}.rows")
        rows.append(
            graph.node("Unsqueeze", row, graph.constant([heads_axis]), name=f"{tables.label}.{name}.heads")
        )
    return rows[0], rows[1]


def rotate(graph: GraphWriter, decoder: Decoder, x: str, rows: tuple[str, str], name: str) -> str:
    """x with its last axis, of head_dim channels, rotated; channels behind rotary_dim stay as they are."""
    half, width = decoder.rotary_dim // 2, decoder.rotary_dim
    first = graph.slice(x, 0, half, axis=3, name=f"{name}.first")
    second = graph.slice(x, half, width, axis=3, name=f"{name}.second")
    whole = width == decoder.head_dim
    rotated = x if whole else graph.slice(x, 0, width, axis=3, name=f"{name}.part")
    turned = graph.node(
        "Concat", graph.node("Neg", second, name=f"{name}.negated"), first, name=f"{name}.turned", axis=3
    )
    straight = graph.node("Mul", rotated, rows[0], name=f"{name}.cosine")
    turned = graph.node("Mul", turned, rows[1], name=f"{name}.sine")
    rotated = graph.node("Add", straight, turned, name=f"{name}.rotated")
    if whole:
        return rotated
    rest = graph.slice(x, width, decoder.head_dim, axis=3, name=f"{name}.rest")
    return graph.node("Concat", rotated, rest, name=f"{name}.joined", axis=3)
