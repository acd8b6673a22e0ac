"""Which modules of a model a recipe's targets mean, by the rules of SparseML (and without the model).

A target is a module's name, the name of its weight, its class name, or "re:" and a pattern that matches
at the start of a name. `None` means every decoder block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UserError
from ..families import Decoder, Family, Outline

ALL_LINEAR = ("__ALL__", "__ALL_PRUNABLE__", "__ALL_QUANTIZABLE__")


@dataclass(frozen=True)
class Module:
    """One module of a causal language model, as named_modules() would list it."""

    name: str
    kind: str


def modules_of(decoder: Outline) -> list[Module]:
    """The modules of a model, in model order: outer ones before inner ones."""
    family = decoder.family
    prefix = _class_prefix(family)
    base = family.blocks.rpartition(".")[0]
    before = [
        Module("", family.architectures[0]),
        Module(base, family.base_class or f"{prefix}Model"),
        Module(family.embedding, family.embedding_class),
        Module(family.blocks, "ModuleList"),
    ]
    inside = _modules_of_block if isinstance(decoder, Decoder) else _linears_of_block
    blocks = [module for i in range(decoder.blocks) for module in inside(decoder, prefix, i)]
    return [*before, *blocks, Module(family.final_norm, _norm_class(family)), Module(family.head, "Linear")]


def _class_prefix(family: Family) -> str:
    return family.architectures[0].removesuffix("ForCausalLM")


def _norm_class(family: Family) -> str:
    return "LayerNorm" if family.norm == "layer" else f"{_class_prefix(family)}RMSNorm"


def _linears_of_block(decoder: Outline, prefix: str, index: int) -> Iterator[Module]:
    """All that is known of a block whose family is not described; its class cannot be a target."""
    block = decoder.family.block(index)
    yield Module(block, "")
    for layer in decoder.family.linears:
        yield Module(f"{block}.{layer}", "Linear")


def _modules_of_block(decoder: Outline, prefix: str, index: int) -> Iterator[Module]:
    family = decoder.family
    block = family.block(index)
    yield Module(block, f"{prefix}DecoderLayer")
    for layers, kind in ((family.attention, "Attention"), (family.mlp, "MLP")):
        parent = layers[0].rpartition(".")[0]
        if parent:
            yield Module(f"{block}.{parent}", f"{prefix}{kind}")
        for layer in layers:
            yield Module(f"{block}.{layer}", "Linear")
    norms = (family.attention_norm, family.mlp_norm)
    for norm in norms + (family.branch_norms or ()) + (family.query_key_norms or ()):
        yield Module(f"{block}.{norm}", _norm_class(family))


def linears_within(module: str, decoder: Outline) -> list[str]:
    """Names of the linear layers that `module` is or contains, in model order."""
    inside = f"{module}." if module else ""
    return [
        candidate.name
        for candidate in modules_of(decoder)
        if candidate.kind == "Linear" and (candidate.name == module or candidate.name.startswith(inside))
    ]


def resolve_targets(targets: str | list[str] | None, decoder: Outline, place: str) -> list[str]:
    """Names of the modules that `targets` match, in model order.

    `place` is the field's path, for the UserError when a target matches nothing or is no valid pattern.
    As in SparseML, a module counts for the first target that matches it.
    """
    if targets is None:
        return [decoder.family.block(index) for index in range(decoder.blocks)]
    if isinstance(targets, str) and targets in ALL_LINEAR:
        return linears_within("", decoder)
    wanted = [targets] if isinstance(targets, str) else targets
    patterns = [_compile(target, place) for target in wanted]
    unused = set(range(len(wanted)))
    found = []
    for module in modules_of(decoder):
        match = _first_match(module, wanted, patterns)
        if match is not None:
            unused.discard(match)
            found.append(module.name)
    if unused:
        raise UserError(f"{place}: {wanted[min(unused)]!r} matches no module {_beyond(unused, wanted)}")
    return found


def _beyond(unused: set[int], wanted: list[str]) -> str:
    return "that an earlier target does not match" if min(unused) > 0 else "of this model"


def _compile(target: str, place: str) -> re.Pattern[str] | None:
    if not target.startswith("re:"):
        return None
    try:
        return re.compile(target[3:])
    except re.error as error:
        raise UserError(f"{place}: {target!r} is no valid pattern: {error}") from None


def _first_match(module: Module, targets: list[str], patterns: list[re.Pattern[str] | None]) -> int | None:
    names = (module.name, f"{module.name}.weight") if _has_weight(module) else (module.name,)
    for index, (target, pattern) in enumerate(zip(targets, patterns, strict=True)):
        if pattern is None and target in (*names, module.kind):
            return index
        if pattern is not None and any(pattern.match(name) for name in names):
            return index
    return None


def _has_weight(module: Module) -> bool:
    return module.kind.endswith(("Linear", "Embedding", "Norm"))
