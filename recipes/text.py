"""A recipe as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import (
    BlockPruning,
    ConstantPruningModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationModifier,
    Recipe,
)

BAR = 30


def recipe_text(recipe: Recipe) -> str:
    """Every stage and modifier of `recipe`, with the sparsity of each block as a bar."""
    return "\n".join(_lines(recipe))


def _lines(recipe: Recipe) -> Iterator[str]:
    for key, value in recipe.other.items():
        yield f"{key}: {_flat(value)}"
    for name, stage in recipe.stages.items():
        yield name or "(no stage)"
        for key, value in stage.other.items():
            yield f"  {key}: {_flat(value)}"
        for group in stage.groups.values():
            for kind, modifier in group.items():
                yield f"  {kind}: {_summary(modifier)}"
                yield from _bars(modifier)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    return str(value)


def _summary(modifier: Modifier) -> str:
    if isinstance(modifier, BlockPruning):
        return (
            f"{_sparsity(modifier)}, {_structure(modifier.mask_structure)}, on {_targets(modifier.targets)}"
        )
    if isinstance(modifier, MagnitudePruningModifier):
        return f"{modifier.final_sparsity:.4g}, {modifier.mask_structure}, on {_targets(modifier.targets)}"
    if isinstance(modifier, ConstantPruningModifier):
        return f"zeros stay zero, on {_targets(modifier.targets)}"
    if isinstance(modifier, QuantizationModifier):
        return _quantization(modifier)
    return _flat(modifier.model_dump(exclude_unset=True))


def _sparsity(modifier: BlockPruning) -> str:
    if not isinstance(modifier.sparsity, list):
        profile = f", spread by {modifier.sparsity_profile}" if modifier.sparsity_profile else ""
        return f"{modifier.sparsity:.4g}{profile}"
    values = modifier.sparsity
    if not values:
        return "no sparsities"
    mean = sum(values) / len(values)
    return f"{len(values)} sparsities, mean {mean:.4f}, from {min(values):.4f} to {max(values):.4f}"


def _structure(mask_structure: str) -> str:
    return "unstructured" if mask_structure == "0:0" else f"{mask_structure} pruned"


def _targets(targets: str | list[str] | None) -> str:
    if targets is None:
        return "every decoder block"
    return targets if isinstance(targets, str) else ", ".join(targets)


def _quantization(modifier: QuantizationModifier) -> str:
    schemes = [
        f"{part} {arguments.type}{arguments.num_bits} per {arguments.strategy or 'tensor'}"
        for scheme in (modifier.config_groups or {}).values()
        for part, arguments in (("weights", scheme.weights), ("activations", scheme.input_activations))
        if arguments
    ]
    return ", ".join(schemes) or _flat(modifier.scheme)


def _bars(modifier: Modifier) -> Iterator[str]:
    if isinstance(modifier, BlockPruning) and isinstance(modifier.sparsity, list):
        for index, sparsity in enumerate(modifier.sparsity):
            yield f"    {index:3d}  {sparsity:.4f}  {'#' * round(sparsity * BAR)}"
