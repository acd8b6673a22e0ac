"""Between pruning and recipes: what a pruning run did as a recipe, and what a recipe asks pruning to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..artifact import Activations, BlockSparsity, Precision, Pruning
from ..errors import UserError
from ..families import Family, Outline
from .recipe import (
    BlockPruning,
    ConstantPruningModifier,
    MagnitudePruningModifier,
    Modifier,
    QuantizationArguments,
    QuantizationModifier,
    QuantizationScheme,
    Recipe,
    SparseGPTModifier,
    Stage,
    WandaPruningModifier,
)
from .targets import linears_within, resolve_targets

UNSTRUCTURED = "unstructured"
# The method of masks that were found in a checkpoint: nobody can repeat it, so their recipe only holds them.
GIVEN = "given"
_UNSTRUCTURED_MASKS = ("0:0", UNSTRUCTURED)
_ONE_SHOT: dict[str, type[BlockPruning]] = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
_METHODS: dict[type[Modifier], str] = {
    **{kind: method for method, kind in _ONE_SHOT.items()},
    MagnitudePruningModifier: "magnitude",
}


def recipe_from_pruning(
    pruning: Pruning,
    family: Family,
    quant: Precision = "fp32",
    group_size: int = 128,
    activations: Activations = "dynamic",
) -> Recipe:
    """The recipe by which SparseML or llm-compressor repeats `pruning`, and then quantizes to `quant`.

    Wanda and SparseGPT become one one-shot modifier with a sparsity per block; magnitude, which SparseML
    knows only as training, one modifier per block. The last stage freezes the zeros for fine-tuning.
    int4 shares one scale among `group_size` inputs; see `group_size_of`. int8 has one scale per token, or
    with static `activations` one per layer input.
    """
    blocks = sorted(pruning.blocks, key=lambda block: block.index)
    if pruning.method in ("magnitude", GIVEN):
        stages = {}
        if pruning.method == "magnitude":
            stages["prune_train_stage"] = Stage(_magnitude_groups(blocks, pruning.pattern, family))
        if quant != "fp32":
            stages["quantize_oneshot_stage"] = Stage(_quantization_group(quant, group_size, activations))
    else:
        quantization = _quantization_group(quant, group_size, activations)
        groups = _one_shot_groups(blocks, pruning, family) | quantization
        stages = {"prune_oneshot_stage": Stage(groups)}
    stages["finetune_train_stage"] = Stage(
        {"constant_modifiers": {"ConstantPruningModifier": _constant_pruning(family)}}
    )
    return Recipe(stages, {"dlp_deploy": _provenance(pruning)})


def _provenance(pruning: Pruning) -> dict[str, Any]:
    """How the sparsities came about. Without text values that SparseML could take for `eval(...)`."""
    shown = pruning.model_dump(
        include={"method", "allocation", "statistic", "alpha", "pattern", "sparsity_asked"}, exclude_none=True
    )
    if pruning.calibration:
        shown["calibration"] = pruning.calibration.model_dump(exclude={"source"})
    return shown


def _blocks_target(family: Family) -> str:
    return rf"re:{family.blocks}.\d+$"


def _linears_target(family: Family, block: str = r"\d+") -> str:
    """SparseML looks for the weight's name, llm-compressor for the module's; neither may find the bias."""
    last_names = dict.fromkeys(linear.rpartition(".")[2] for linear in family.linears)
    return rf"re:{family.blocks}.{block}\..*({'|'.join(last_names)})(\.weight)?$"


def _one_shot_groups(
    blocks: list[BlockSparsity], pruning: Pruning, family: Family
) -> dict[str, dict[str, Modifier]]:
    kind = _ONE_SHOT[pruning.method]
    if pruning.pattern.startswith("N:"):
        return {
            f"block_{block.index}_modifiers": {
                kind.__name__: _one_shot(kind, block.asked, structure, rf"re:{family.block(block.index)}$")
            }
            for block in blocks
            if (structure := _mixed_structure(block, int(pruning.pattern[2:]))) is not None
        }
    structure = "0:0" if pruning.pattern == UNSTRUCTURED else pruning.pattern
    sparsities = [block.asked for block in blocks]
    modifier = _one_shot(kind, sparsities, structure, _blocks_target(family))
    return {"pruning_modifiers": {kind.__name__: modifier}}


def _one_shot(
    kind: type[BlockPruning], sparsity: float | list[float], structure: str, target: str
) -> BlockPruning:
    return kind(sparsity=sparsity, mask_structure=structure, sequential_update=True, targets=[target])


def _mixed_structure(block: BlockSparsity, group: int) -> str | None:
    """The N:M of one block under the mixed pattern "N:M"; None when N is 0, and the block stays dense."""
    pruned = round(block.asked * group)
    return f"{pruned}:{group}" if pruned else None


def _magnitude_groups(
    blocks: list[BlockSparsity], pattern: str, family: Family
) -> dict[str, dict[str, Modifier]]:
    return {
        f"block_{block.index}_modifiers": {
            "MagnitudePruningModifier": MagnitudePruningModifier(
                targets=[_linears_target(family, str(block.index))],
                init_sparsity=block.asked,
                final_sparsity=block.asked,
                start=0.0,
                end=1.0,
                mask_structure=pattern,
            )
        }
        for block in blocks
    }


def _constant_pruning(family: Family) -> ConstantPruningModifier:
    return ConstantPruningModifier(targets=[_linears_target(family)], start=0.0)


def _quantization_group(
    quant: Precision, group_size: int, activations: Activations
) -> dict[str, dict[str, Modifier]]:
    """Symmetric weights, so that a zero stays zero: int8 per channel, or int4 in groups."""
    if quant == "fp32":
        return {}
    if quant == "int8":
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArguments(num_bits=8, type="int", symmetric=True, strategy="channel"),
            input_activations=QuantizationArguments(
                num_bits=8,
                type="int",
                symmetric=True,
                strategy="token" if activations == "dynamic" else "tensor",
                dynamic=activations == "dynamic",
            ),
        )
    else:
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArguments(
                num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
            ),
        )
    modifier = QuantizationModifier(config_groups={"group_0": scheme})
    return {"quantization_modifiers": {"QuantizationModifier": modifier}}


def group_size_of(decoder: Outline) -> int:
    """The largest usual group that divides the inputs of every layer, as the tools demand of int4."""
    inputs = math.gcd(decoder.hidden, decoder.intermediate, decoder.heads * decoder.head_dim)
    return next((size for size in (128, 64, 32) if inputs % size == 0), math.gcd(inputs, 128))


@dataclass(frozen=True)
class PruningPlan:
    """What a recipe asks of pruning. `sparsities` has one entry per decoder block, in order.

    With `allocation` "owl" the recipe leaves the sparsities to OWL (arXiv 2310.05175): `sparsities` is
    then empty, and `sparsity`, `owl_m` and `owl_lambda` are its parameters.
    """

    method: str
    pattern: str
    allocation: str
    sparsity: float
    sparsities: tuple[float, ...]
    owl_m: int | None = None
    owl_lambda: float | None = None


def plan_of(recipe: Recipe, decoder: Outline) -> PruningPlan:
    """The pruning that `recipe` describes for a model.

    Raises UserError when it has none, mixes methods or patterns, gives the linear layers of one block
    different sparsities, or prunes something outside the decoder blocks.
    """
    check_recipe(recipe, decoder)
    found = list(_pruning_modifiers(recipe))
    if not found:
        raise UserError(
            "the recipe prunes nothing; it needs a WandaPruningModifier, SparseGPTModifier or the like"
        )
    method = _only([(place, _METHODS[type(modifier)]) for place, modifier in found], "method")
    pattern = _common_pattern([(place, _pattern(modifier)) for place, modifier in found])
    owl = [modifier for _, modifier in found if isinstance(modifier, BlockPruning) and _is_owl(modifier)]
    if owl:
        return _owl_plan(owl[0], method, pattern, alone=len(found) == 1)
    sparsities = _per_block(weight_sparsities(recipe, decoder), decoder)
    return PruningPlan(method, pattern, "recipe", math.fsum(sparsities) / len(sparsities), sparsities)


def sparsities_of(recipe: Recipe, decoder: Outline) -> tuple[float, ...]:
    """The sparsity of each decoder block; 0 for a block that the recipe leaves dense.

    Raises UserError as `plan_of` does, and when the recipe leaves the sparsities to OWL.
    """
    plan = plan_of(recipe, decoder)
    if not plan.sparsities:
        raise UserError("the recipe leaves the sparsities to OWL; run prune with it to find them")
    return plan.sparsities


def weight_sparsities(recipe: Recipe, decoder: Outline) -> dict[str, float]:
    """The sparsity that `recipe` asks of each linear layer ("model.layers.0.mlp.up_proj"), in model order."""
    asked: dict[str, float] = {}
    for place, modifier in _pruning_modifiers(recipe):
        modules = resolve_targets(modifier.targets, decoder, f"{place}.targets")
        for module, sparsity in zip(modules, _spread(modifier, len(modules), place), strict=True):
            for linear in linears_within(module, decoder):
                if asked.setdefault(linear, sparsity) != sparsity:
                    raise UserError(
                        f"{place}.targets: {linear} is pruned twice, to {asked[linear]} and {sparsity}"
                    )
    return asked


def check_recipe(recipe: Recipe, decoder: Outline) -> None:
    """Raise UserError, naming the field, unless the recipe fits the model.

    Every target of every known modifier must match something, and a list of sparsities must have one
    entry for each matched module.
    """
    for place, _, modifier in recipe.modifiers():
        if isinstance(modifier, BlockPruning | MagnitudePruningModifier | ConstantPruningModifier):
            modules = resolve_targets(modifier.targets, decoder, f"{place}.targets")
            if isinstance(modifier, BlockPruning | MagnitudePruningModifier):
                _spread(modifier, len(modules), place)
        if isinstance(modifier, QuantizationModifier):
            for name, scheme in (modifier.config_groups or {}).items():
                resolve_targets(scheme.targets, decoder, f"{place}.config_groups.{name}.targets")
    weight_sparsities(recipe, decoder)


def _pruning_modifiers(recipe: Recipe) -> Iterator[tuple[str, BlockPruning | MagnitudePruningModifier]]:
    for place, _, modifier in recipe.modifiers():
        if isinstance(modifier, BlockPruning | MagnitudePruningModifier):
            yield place, modifier


def _spread(modifier: BlockPruning | MagnitudePruningModifier, modules: int, place: str) -> list[float]:
    """One sparsity for each of `modules` matched modules."""
    structured = _n_of_m(modifier)
    if isinstance(modifier, MagnitudePruningModifier):
        given: float | list[float] = modifier.final_sparsity
    else:
        given = modifier.sparsity
    if isinstance(given, list) and len(given) != modules:
        raise UserError(f"{place}.sparsity: {len(given)} sparsities for {modules} matched modules")
    if structured is not None:
        return [structured] * modules
    return given if isinstance(given, list) else [given] * modules


def _n_of_m(modifier: BlockPruning | MagnitudePruningModifier) -> float | None:
    """N / M of the mask_structure "N:M"; None when it has another form or is unstructured."""
    if modifier.mask_structure in _UNSTRUCTURED_MASKS or isinstance(modifier, MagnitudePruningModifier):
        return None
    pruned, group = (int(part) for part in modifier.mask_structure.split(":"))
    return pruned / group


def _pattern(modifier: BlockPruning | MagnitudePruningModifier) -> str:
    return UNSTRUCTURED if modifier.mask_structure in _UNSTRUCTURED_MASKS else modifier.mask_structure


def _is_owl(modifier: BlockPruning) -> bool:
    return (modifier.sparsity_profile or "").lower() == "owl"


def _owl_plan(modifier: BlockPruning, method: str, pattern: str, alone: bool) -> PruningPlan:
    if not alone or isinstance(modifier.sparsity, list):
        raise UserError(
            "sparsity_profile: owl needs one pruning modifier with one sparsity, which OWL spreads"
        )
    return PruningPlan(
        method,
        pattern,
        "owl",
        modifier.sparsity,
        (),
        owl_m=5 if modifier.owl_m is None else modifier.owl_m,
        owl_lambda=0.08 if modifier.owl_lmbda is None else modifier.owl_lmbda,
    )


def _only(found: list[tuple[str, str]], what: str) -> str:
    place, first = found[0]
    for other_place, other in found[1:]:
        if other != first:
            raise UserError(
                f"{other_place}: {what} {other}, but {place} has {first}; prune takes one for all blocks"
            )
    return first


def _common_pattern(found: list[tuple[str, str]]) -> str:
    """The one pattern, or "N:8" when the blocks have N:8 with an N of their own (DLP's mixed N:8)."""
    groups = {pattern.partition(":")[2] for _, pattern in found}
    if len(groups) == 1 and len({pattern for _, pattern in found}) > 1:
        return f"N:{groups.pop()}"
    return _only(found, "mask_structure")


def _per_block(asked: dict[str, float], decoder: Outline) -> tuple[float, ...]:
    outside = dict(asked)
    sparsities = []
    for index in range(decoder.blocks):
        block = decoder.family.block(index)
        linears = [f"{block}.{linear}" for linear in decoder.family.linears]
        values = {outside.pop(linear, 0.0) for linear in linears}
        if len(values) > 1:
            raise UserError(
                f"targets: the layers of {block} differ in sparsity; prune takes one for a whole block"
            )
        sparsities.append(values.pop())
    if outside:
        raise UserError(
            f"targets: {next(iter(outside))} is outside the decoder blocks; prune leaves it dense "
            "(the head is pruned by its --head-sparsity)"
        )
    return tuple(sparsities)
