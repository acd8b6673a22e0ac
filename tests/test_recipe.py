"""The typed recipe: round trips, what it asks of a model, and what is refused."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from dlp_deploy.artifact import BlockSparsity, CalibrationRecord, Pruning
from dlp_deploy.errors import UserError
from dlp_deploy.families import Decoder, decoder_of
from dlp_deploy.recipes.plan import (
    check_recipe,
    group_size_of,
    plan_of,
    recipe_from_pruning,
    sparsities_of,
    weight_sparsities,
)
from dlp_deploy.recipes.ready_made import load_recipe, ready_made
from dlp_deploy.recipes.recipe import parse_recipe, read_recipe, recipe_yaml, write_recipe
from dlp_deploy.recipes.targets import linears_within, modules_of, resolve_targets
from dlp_deploy.recipes.text import recipe_text

from .tiny_models import TINY_CONFIGS


def config_of(blocks: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    )


@pytest.fixture
def decoder() -> Decoder:
    return decoder_of(config_of())


def pruning(method: str = "wanda", pattern: str = "unstructured", blocks: int = 3) -> Pruning:
    return Pruning(
        method=method,
        allocation="dlp",
        statistic="median",
        alpha=0.15,
        pattern=pattern,
        sparsity_asked=0.7,
        sparsity=0.6998,
        blocks=tuple(
            BlockSparsity(index=i, score=1.0 + i, asked=0.6 + 0.1 * i, measured=0.6 + 0.1 * i, weights=100)
            for i in range(blocks)
        ),
        calibration=CalibrationRecord(
            source="builtin", windows=8, tokens_per_window=64, seed=0, sha256="ab" * 32
        ),
    )


def wanda(fields: str) -> str:
    return f"a_stage: {{b_modifiers: {{WandaPruningModifier: {{{fields}}}}}}}"


FOREIGN = """
version: 1.1.0
note: kept
args: {lr: 0.1}
first_stage:
  run_type: oneshot
  newer_modifiers:
    SpinQuantModifier: {rotations: [R1, R2], transform_type: hadamard}
  pruning_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      targets: [LlamaDecoderLayer]
      offload_hessians: true
  quant_modifiers:
    GPTQModifier: {scheme: W4A16, targets: Linear, ignore: [lm_head], actorder: weight}
    SmoothQuantModifier: {smoothing_strength: 0.8, mappings: [[["re:.*q_proj"], "re:.*input_layernorm"]]}
stages:
  second:
    last_modifiers:
      ConstantPruningModifier: {targets: ["re:.*_proj.weight"], start: 0, update: 1}
"""


def plain(recipe):
    """The values of a recipe, for comparison whatever the modifiers' classes."""
    return yaml.safe_load(recipe_yaml(recipe))


def test_unknown_fields_survive():
    recipe = parse_recipe(FOREIGN)
    assert parse_recipe(recipe_yaml(recipe)) == recipe
    original, written = yaml.safe_load(FOREIGN), plain(recipe)
    assert written["second_stage"] == original["stages"]["second"]
    assert {key: written[key] for key in original if key != "stages"} == {
        key: value for key, value in original.items() if key != "stages"
    }


names = st.text("abcxyz_", min_size=1, max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
modifiers = st.dictionaries(
    names.map(lambda n: f"{n}Modifier"), st.dictionaries(names, values, max_size=4), min_size=1
)
stages = st.dictionaries(names.map(lambda n: f"{n}_modifiers"), modifiers, min_size=1)
recipes = st.dictionaries(names.map(lambda n: f"{n}_stage"), stages, min_size=1)


@settings(deadline=None)
@given(recipes, st.dictionaries(names.map(lambda n: "x" + n.strip("_")), values, max_size=3))
def test_any_recipe_survives_a_round_trip(content, other):
    content = {**other, **content}
    written = plain(parse_recipe(yaml.safe_dump(content, sort_keys=False)))
    assert written == content


@pytest.mark.parametrize("quant", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_recipe_of_a_pruning_asks_for_that_pruning(tmp_path, decoder, method, quant):
    recipe = recipe_from_pruning(pruning(method), decoder.family, quant)
    write_recipe(tmp_path / "recipe.yaml", recipe, "made\nby a test")
    read = read_recipe(tmp_path / "recipe.yaml")
    assert read == recipe
    plan = plan_of(read, decoder)
    assert (plan.method, plan.pattern, plan.allocation) == (method, "unstructured", "recipe")
    assert plan.sparsities == pytest.approx([0.6, 0.7, 0.8])
    assert plan.sparsity == pytest.approx(0.7)
    kinds = [kind for _, kind, _ in read.modifiers()]
    assert kinds[-1] == "ConstantPruningModifier"
    assert ("QuantizationModifier" in kinds) == (quant != "fp32")


def test_n_of_m_pruning_comes_back_as_such(decoder):
    recipe = recipe_from_pruning(pruning(pattern="2:4"), decoder.family)
    plan = plan_of(recipe, decoder)
    assert plan.pattern == "2:4"
    assert plan.sparsities == (0.5, 0.5, 0.5)


def test_mixed_n_of_m_has_an_n_for_each_block(decoder):
    recipe = recipe_from_pruning(pruning(pattern="N:8"), decoder.family)
    structures = [
        modifier.mask_structure for *_, modifier in recipe.modifiers() if hasattr(modifier, "sparsity")
    ]
    assert structures == ["5:8", "6:8", "6:8"]
    plan = plan_of(recipe, decoder)
    assert plan.pattern == "N:8"
    assert plan.sparsities == (5 / 8, 6 / 8, 6 / 8)


def test_int4_groups_divide_every_input(decoder):
    recipe = recipe_from_pruning(pruning(), decoder.family, "int4", group_size_of(decoder))
    modifier = next(modifier for _, kind, modifier in recipe.modifiers() if kind == "QuantizationModifier")
    assert modifier.config_groups["group_0"].weights.group_size == 8  # of 16 and 24 inputs


def test_structures_are_never_bare_in_the_file(decoder):
    """A bare 2:4 is the number 124 to YAML 1.1."""
    text = recipe_yaml(recipe_from_pruning(pruning(pattern="2:4"), decoder.family))
    assert "mask_structure: '2:4'" in text


def test_every_linear_gets_its_sparsity(decoder):
    asked = weight_sparsities(recipe_from_pruning(pruning(), decoder.family), decoder)
    assert len(asked) == 3 * 7
    assert asked["model.layers.1.mlp.down_proj"] == pytest.approx(0.7)
    assert "lm_head" not in asked


def test_blocks_left_out_stay_dense(decoder):
    recipe = parse_recipe(wanda("sparsity: [0.5], targets: [model.layers.1]"))
    assert sparsities_of(recipe, decoder) == (0.0, 0.5, 0.0)


def test_layers_named_one_by_one_make_up_blocks(decoder):
    everywhere = parse_recipe(wanda(r"sparsity: 0.5, targets: ['re:model.layers.\d+.*_proj']"))
    assert sparsities_of(everywhere, decoder) == (0.5, 0.5, 0.5)
    only_mlp = parse_recipe(wanda(r"sparsity: 0.5, targets: ['re:.*mlp$']"))
    with pytest.raises(UserError, match="differ in sparsity"):
        sparsities_of(only_mlp, decoder)


def test_owl_leaves_the_sparsities_to_pruning(decoder):
    plan = plan_of(load_recipe("owl-70"), decoder)
    assert (plan.allocation, plan.sparsity, plan.sparsities) == ("owl", 0.7, ())
    assert (plan.owl_m, plan.owl_lambda) == (5, 0.08)
    with pytest.raises(UserError, match="OWL"):
        sparsities_of(load_recipe("owl-70"), decoder)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("llama-7b-dlp-70", 32), ("llama-13b-dlp-70", 40), ("llama2-7b-dlp-70", 32), ("llama2-13b-dlp-70", 40)],
)
def test_published_sparsities(name, blocks):
    sparsities = sparsities_of(load_recipe(name), decoder_of(config_of(blocks)))
    assert len(sparsities) == blocks
    assert sum(sparsities) / blocks == pytest.approx(0.7, abs=2e-5)
    assert max(sparsities) - min(sparsities) == pytest.approx(0.3, abs=1e-4), "the range is 2 alpha"


def test_every_ready_made_recipe_loads_by_name():
    assert len(ready_made()) >= 6
    files = resources.files("dlp_deploy.recipes")
    for name in ready_made():
        assert load_recipe(name) == read_recipe(files / f"{name}.yaml")
        assert "WandaPruningModifier" in recipe_text(load_recipe(name))


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UserError, match="llama2-7b-dlp-70"):
        load_recipe("llama2-7b")


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_module_names_are_those_of_transformers(kind):
    config = TINY_CONFIGS[kind]()
    model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    real = {name: type(module).__name__ for name, module in model.named_modules()}
    for module in modules_of(decoder_of(config)):
        assert real[module.name] == module.kind
    linears = [name for name, class_name in real.items() if class_name == "Linear"]
    assert sorted(linears_within("", decoder_of(config))) == sorted(linears)


def test_targets_by_name_class_weight_and_pattern(decoder):
    blocks = ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert resolve_targets(None, decoder, "t") == blocks
    assert resolve_targets("LlamaDecoderLayer", decoder, "t") == blocks
    assert resolve_targets([r"re:model.layers.\d+$"], decoder, "t") == blocks
    assert resolve_targets(["model.layers.2", "model.layers.0"], decoder, "t") == [blocks[0], blocks[2]]
    assert resolve_targets("lm_head", decoder, "t") == ["lm_head"]
    assert resolve_targets("__ALL_PRUNABLE__", decoder, "t")[-1] == "lm_head"
    weight = "model.layers.1.mlp.up_proj.weight"
    assert resolve_targets([weight], decoder, "t") == [weight.removesuffix(".weight")]
    assert len(resolve_targets("Linear", decoder, "t")) == 3 * 7 + 1


def test_classes_are_named_after_the_family():
    config = Qwen2Config(num_hidden_layers=2, architectures=["Qwen2ForCausalLM"])
    assert resolve_targets("Qwen2DecoderLayer", decoder_of(config), "t") == [
        "model.layers.0",
        "model.layers.1",
    ]


PLACE = "a_stage.b_modifiers.WandaPruningModifier"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (wanda("sparsity: much"), f"{PLACE}.sparsity: .*number .*'much'"),
        (wanda("sparsity: '0.7'"), f"{PLACE}.sparsity: .*number"),
        (wanda("sparsity: 1.5"), f"{PLACE}.sparsity: .*less than 1 .*1.5"),
        (wanda("sparsity: -0.1"), f"{PLACE}.sparsity"),
        (wanda("sparsity: .nan"), f"{PLACE}.sparsity: .*finite"),
        (wanda("sparsity: [0.5, true]"), rf"{PLACE}.sparsity.1: .*number"),
        (wanda("sparsity: [0.5, [0.5]]"), rf"{PLACE}.sparsity.1: .*number"),
        (wanda("sparsity: 'eval(target)'"), f"{PLACE}.sparsity: .*number"),
        (wanda("targets: [a]"), f"{PLACE}.sparsity: field required"),
        (wanda("sparsity: 0.5, targets: 3"), f"{PLACE}.targets: .*string"),
        (wanda("sparsity: 0.5, targets: [3]"), f"{PLACE}.targets.0: .*string"),
        (wanda("sparsity: 0.5, mask_structure: 2:4"), f"{PLACE}.mask_structure: put it in quotes"),
        (wanda("sparsity: 0.5, mask_structure: '5:4'"), f"{PLACE}.mask_structure: .*0 < N <= M"),
        (wanda("sparsity: 0.5, mask_structure: dense"), f"{PLACE}.mask_structure"),
        ("a_stage: {b_modifiers: {WandaPruningModifier: 3}}", f"{PLACE}: must be a mapping, not a int"),
        (
            "a_stage: {b_modifiers: [WandaPruningModifier]}",
            "a_stage.b_modifiers: must be a mapping, not a list",
        ),
        ("a_stage: 3", "a_stage: must be a mapping"),
        ("a_stage: {x: 1}", "no modifiers"),
        ("- a", "the recipe: must be a mapping, not a list"),
        ("", "the recipe: must be a mapping, not empty"),
        ("1: 2", "the key 1 must be text"),
        (
            "a_stage: {b_modifiers: {QuantizationModifier: {config_groups: {g: {targets: 1}}}}}",
            r"config_groups.g.targets",
        ),
    ],
)
def test_a_wrong_field_is_named(text, named):
    with pytest.raises(UserError, match=named):
        parse_recipe(text)


def laughs() -> str:
    text = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{name}: &{name} [{', '.join(['*' + last] * 9)}]\n"
    return text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (laughs(), "aliases expand to more than"),
        ("a: &a [*a]", "alias contains itself"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "x" * 300_000, "larger than"),
        ("a: !!python/object/apply:os.system [id]", "not valid YAML: could not determine a constructor"),
        ("a_stage: 1\na_stage: 2", r"a_stage is there twice in one mapping \(line 2\)"),
        ("a: [", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: 2024-99-99", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
    ],
)
def test_hostile_yaml_is_refused(text, named):
    with pytest.raises(UserError, match=named):
        parse_recipe(text)


def test_aliases_as_sparseml_writes_them_are_fine():
    recipe = parse_recipe(
        "a_stage: {b_modifiers: {X: {targets: &id001 [p]}}}\nc_stage: {d_modifiers: {Y: {targets: *id001}}}"
    )
    assert "*" not in recipe_yaml(recipe)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ("sparsity: [0.5, 0.5, 0.5, 0.5]", r"Modifier.sparsity: 4 sparsities for 3 matched modules"),
        ("sparsity: [0.5]", r"Modifier.sparsity: 1 sparsities for 3 matched modules"),
        ("sparsity: 0.5, targets: ['re:encoder.*']", r"Modifier.targets: 're:encoder\.\*' matches no module"),
        ("sparsity: 0.5, targets: ['re:model.*', 'model.layers.0']", "that an earlier target does not match"),
        ("sparsity: 0.5, targets: ['re:(']", "no valid pattern"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(decoder, fields, named):
    with pytest.raises(UserError, match=named):
        check_recipe(parse_recipe(wanda(fields)), decoder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "a_stage: {b_modifiers: {ConstantPruningModifier: {targets: [x]}}}",
            "ConstantPruningModifier.targets: 'x'",
        ),
        (
            "a_stage: {b_modifiers: {QuantizationModifier: {config_groups: {g: {targets: [Conv2d]}}}}}",
            "QuantizationModifier.config_groups.g.targets: 'Conv2d'",
        ),
        (
            "a_stage: {b_modifiers: {MagnitudePruningModifier: "
            "{targets: [y], init_sparsity: 0, final_sparsity: 0.5}}}",
            "MagnitudePruningModifier.targets: 'y'",
        ),
    ],
)
def test_targets_of_every_kind_are_checked(decoder, text, named):
    with pytest.raises(UserError, match=re.escape(named)):
        check_recipe(parse_recipe(text), decoder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a_stage: {b_modifiers: {ConstantPruningModifier: {targets: [Linear]}}}", "prunes nothing"),
        (wanda("sparsity: 0.5, targets: [Linear]"), "lm_head is outside the decoder blocks"),
        (
            "a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 0.5, targets: [model.layers.0]}, "
            "SparseGPTModifier: {sparsity: 0.5, targets: [model.layers.1]}}}",
            "method sparsegpt, but",
        ),
        (
            "a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 0.5, targets: [model.layers.0]}}, "
            "c_modifiers: {WandaPruningModifier: {sparsity: 0.6, targets: [model.layers.0]}}}",
            "pruned twice",
        ),
    ],
)
def test_what_prune_cannot_do_is_said(decoder, text, named):
    with pytest.raises(UserError, match=named):
        plan_of(parse_recipe(text), decoder)


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not text"):
        read_recipe(tmp_path / "binary.yaml")


def test_show_names_what_matters(decoder):
    text = recipe_text(recipe_from_pruning(pruning(), decoder.family, "int8"))
    assert "3 sparsities, mean 0.7000, from 0.6000 to 0.8000" in text
    assert "weights int8 per channel, activations int8 per token" in text
    assert "zeros stay zero" in text
    assert "statistic median" in text
