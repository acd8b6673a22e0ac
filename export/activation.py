"""Activation functions in operators that every engine takes."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import UserError
from .graph import GraphWriter


def activate(graph: GraphWriter, x: str, activation: str) -> str:
    """An activation by its name in transformers. Raises UserError for one that is not written here."""
    if activation not in ACTIVATIONS:
        raise UserError(
            f"config.json: activation {activation} is not supported by the exporter; "
            f"supported are: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[activation](graph, x)


def soft_cap(graph: GraphWriter, x: str, cap: float, name: str) -> str:
    """cap * tanh(x / cap)."""
    small = graph.node("Mul", x, graph.scalar(1.0 / cap), name=f"{name}.small")
    return graph.node("Mul", graph.node("Tanh", small, name=f"{name}.tanh"), graph.scalar(cap), name=name)


def _silu(graph: GraphWriter, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x, name=f"{x}.sigmoid"), name=f"{x}.silu")


def _relu(graph: GraphWriter, x: str) -> str:
    return graph.node("Relu", x, name=f"{x}.relu")


def _gelu(graph: GraphWriter, x: str) -> str:
    """x / 2 * (1 + erf(x / sqrt(2))), as Hendrycks and Gimpel define it (arXiv 1606.08415)."""
    scaled = graph.node("Div", x, graph.scalar(math.sqrt(2)), name=f"{x}.scaled")
    share = graph.node(
        "Add", graph.node("Erf", scaled, name=f"{x}.erf"), graph.scalar(1.0), name=f"{x}.share"
    )
    product = graph.node("Mul", x, share, name=f"{x}.product")
    return graph.node("Mul", product, graph.scalar(0.5), name=f"{x}.gelu")


def _gelu_tanh(graph: GraphWriter, x: str) -> str:
    """Its approximation by tanh, written with (1 + tanh(z)) / 2 = sigmoid(2 z): fewer operators."""
    square = graph.node("Mul", x, x, name=f"{x}.square")
    bend = graph.node("Mul", square, graph.scalar(0.044715), name=f"{x}.bend")
    slope = graph.node("Add", bend, graph.scalar(1.0), name=f"{x}.slope")
    bent = graph.node("Mul", x, slope, name=f"{x}.bent")
    scaled = graph.node("Mul", bent, graph.scalar(2 * math.sqrt(2 / math.pi)), name=f"{x}.scaled")
    return graph.node("Mul", x, graph.node("Sigmoid", scaled, name=f"{x}.sigmoid"), name=f"{x}.gelu")


ACTIVATIONS: dict[str, Callable[[GraphWriter, str], str]] = {
    "silu": _silu,
    "swish": _silu,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
