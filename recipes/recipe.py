"""The SparseML recipe as a small typed model, read and written without losing what it does not know.

    prune_oneshot_stage:                stage: what is done in one go
      pruning_modifiers:                group: only a label
        WandaPruningModifier:           modifier: one algorithm and its fields
          sparsity: [0.61, 0.63, ...]   one number, or one per matched target in model order
          mask_structure: "0:0"         unstructured; "N:M" prunes N of every M weights of a row
          targets: ["re:model.layers.\\\\d+$"]

Keys that are not modelled here (a stage's run_type, a newer modifier, notes of another tool) are kept
as they are and written back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from ..errors import UserError
from ..storage import write_text
from .safe_yaml import MAX_BYTES, dump_yaml, parse_yaml

Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Sparsities = Annotated[
    Annotated[Sparsity, Tag("one")] | Annotated[list[Sparsity], Tag("many")],
    Discriminator(_one_or_many),
]
Targets = Annotated[
    Annotated[str, Tag("one")] | Annotated[list[str], Field(min_length=1), Tag("many")],
    Discriminator(_one_or_many),
]


def _refuse_base_60(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError('put it in quotes, as in "2:4": YAML reads a bare 2:4 as a number in base 60')
    return value


def _n_of_m(value: str) -> str:
    pruned, group = (int(part) for part in value.split(":"))
    if pruned > group or (group and not pruned):
        raise ValueError("an N:M mask prunes N of every M weights, so 0 < N <= M; 0:0 is unstructured")
    return value


MaskStructure = Annotated[
    str, Field(pattern=r"^\d{1,4}:\d{1,4}$"), AfterValidator(_n_of_m), BeforeValidator(_refuse_base_60)
]


class Modifier(BaseModel):
    """A modifier of a kind that is not modelled: all its fields are kept, none is checked."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())


class BlockPruning(Modifier):
    """One-shot pruning of the linear layers in the matched modules (decoder blocks, as a rule).

    With a mask_structure N:M the sparsity is N / M, whatever `sparsity` says.
    """

    sparsity: Sparsities
    sparsity_profile: str | None = None
    owl_m: int | None = None
    owl_lmbda: float | None = None
    mask_structure: MaskStructure = "0:0"
    sequential_update: bool | None = None
    targets: Targets | None = None
    ignore: list[str] | None = None


class WandaPruningModifier(BlockPruning):
    """Wanda (arXiv 2306.11695): |W| * ||X||_2, compared within each output row."""


class SparseGPTModifier(BlockPruning):
    """SparseGPT (arXiv 2301.00774): prunes and corrects the remaining weights."""

    block_size: int | None = Field(default=None, gt=0)
    dampening_frac: float | None = Field(default=None, ge=0)
    preserve_sparsity_mask: bool | None = None


class MagnitudePruningModifier(Modifier):
    """Pruning by |W| during training, from `init_sparsity` at `start` to `final_sparsity` at `end`."""

    targets: Targets
    init_sparsity: Sparsity
    final_sparsity: Sparsity
    start: float | None = None
    end: float | None = None
    mask_structure: str = "unstructured"


class ConstantPruningModifier(Modifier):
    """Keeps the zeros of an already pruned model zero while it is fine-tuned."""

    targets: Targets
    start: float | None = None
    end: float | None = None


class QuantizationArguments(Modifier):
    """How one kind of tensor is quantized, in the terms of compressed-tensors."""

    num_bits: int = Field(default=8, ge=1, le=16)
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool = False


class QuantizationScheme(Modifier):
    targets: list[str]
    weights: QuantizationArguments | None = None
    input_activations: QuantizationArguments | None = None
    output_activations: QuantizationArguments | None = None


class QuantizationModifier(Modifier):
    config_groups: dict[str, QuantizationScheme] | None = None
    scheme: str | dict[str, Any] | None = None
    targets: Targets | None = None
    ignore: list[str] | None = None


class GPTQModifier(QuantizationModifier):
    """GPTQ (arXiv 2210.17323)."""

    block_size: int | None = Field(default=None, gt=0)
    dampening_frac: float | None = Field(default=None, ge=0)
    sequential_update: bool | None = None


class SmoothQuantModifier(Modifier):
    """SmoothQuant (arXiv 2211.10438): moves activation outliers into the weights before quantization."""

    smoothing_strength: float = Field(default=0.5, ge=0, le=1)
    mappings: list[Any] | None = None
    ignore: list[str] | None = None


KINDS: dict[str, type[Modifier]] = {
    kind.__name__: kind
    for kind in (
        WandaPruningModifier,
        SparseGPTModifier,
        MagnitudePruningModifier,
        ConstantPruningModifier,
        QuantizationModifier,
        GPTQModifier,
        SmoothQuantModifier,
    )
}


@dataclass(frozen=True)
class Stage:
    """Groups of modifiers (group -> kind -> modifier) and the stage's other keys, such as run_type."""

    groups: dict[str, dict[str, Modifier]]
    other: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Stages by name, in the order in which they run, and the recipe's other keys.

    Groups that stand outside any stage are in the stage named "".
    """

    stages: dict[str, Stage]
    other: dict[str, Any] = field(default_factory=dict)

    def modifiers(self) -> Iterator[tuple[str, str, Modifier]]:
        """Every modifier in order, as (place, kind, modifier); place is its dotted path in the file."""
        for stage_name, stage in self.stages.items():
            for group_name, group in stage.groups.items():
                for kind, modifier in group.items():
                    place = ".".join(part for part in (stage_name, group_name, kind) if part)
                    yield place, kind, modifier

    def prunes(self) -> bool:
        """Whether any modifier of a known kind prunes."""
        return any(
            isinstance(modifier, BlockPruning | MagnitudePruningModifier) for *_, modifier in self.modifiers()
        )


def parse_recipe(text: str, name: str = "recipe") -> Recipe:
    """Parse a recipe's YAML (or JSON) text. Raises UserError naming `name` and the field that is wrong."""
    content = _mapping(parse_yaml(text, name), name, "the recipe")
    stages: dict[str, Stage] = {}
    other: dict[str, Any] = {}
    loose: dict[str, Any] = {}
    for key, value in content.items():
        if key == "stages":
            for stage_name, stage in _mapping(value, name, key).items():
                stages[f"{stage_name}_stage"] = _stage(stage, name, f"{key}.{stage_name}")
        elif key.endswith("_stage"):
            stages[key] = _stage(value, name, key)
        elif _is_group(key):
            loose[key] = value
        else:
            other[key] = value
    if loose:
        stages[""] = _stage(loose, name, "")
    if not any(stage.groups for stage in stages.values()):
        raise UserError(
            f"{name}: no modifiers; a recipe has <name>_stage: <name>_modifiers: <Kind>Modifier: ..."
        )
    return Recipe(stages, other)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises UserError when it is missing, no text, or no valid recipe."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a recipe file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; give a recipe in YAML") from None
    return parse_recipe(text, str(path))


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe's YAML text. Parsing it returns an equal recipe."""
    content: dict[str, Any] = dict(recipe.other)
    for name, stage in recipe.stages.items():
        groups = {
            group: {kind: modifier.model_dump(exclude_unset=True) for kind, modifier in modifiers.items()}
            for group, modifiers in stage.groups.items()
        }
        content.update({name: {**stage.other, **groups}} if name else groups)
    return dump_yaml(content)


def write_recipe(path: Path, recipe: Recipe, comment: str = "") -> None:
    """Write the recipe, whole or not at all, below `comment` (each of its lines after a "# ")."""
    heading = "".join(f"# {line}\n" for line in comment.splitlines())
    write_text(path, heading + recipe_yaml(recipe))


def _is_group(key: str) -> bool:
    return key == "modifiers" or key.endswith("_modifiers")


def _stage(value: Any, name: str, place: str) -> Stage:
    groups: dict[str, dict[str, Modifier]] = {}
    other: dict[str, Any] = {}
    for key, content in _mapping(value, name, place).items():
        if _is_group(key):
            inside = f"{place}.{key}" if place else key
            groups[key] = {
                kind: _modifier(kind, fields, name, f"{inside}.{kind}")
                for kind, fields in _mapping(content, name, inside).items()
            }
        else:
            other[key] = content
    return Stage(groups, other)


def _modifier(kind: str, fields: Any, name: str, place: str) -> Modifier:
    try:
        return KINDS.get(kind, Modifier).model_validate(_mapping(fields, name, place))
    except ValidationError as error:
        first = error.errors()[0]
        # "one" and "many" tell the alternatives of a union apart; they are no part of the file.
        path = ".".join(str(part) for part in first["loc"] if part not in ("one", "many"))
        found = repr(first["input"])
        message = first["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        shown = f" (found {found})" if first["type"] != "missing" and len(found) < 60 else ""
        raise UserError(f"{name}: {place}.{path}: {message}{shown}") from None


def _mapping(value: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name}: {place}: must be a mapping, not {_kind_of(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{name}: {place}: the key {key!r} must be text; put it in quotes")
    return value


def _kind_of(value: Any) -> str:
    names = {type(None): "empty", list: "a list", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")
