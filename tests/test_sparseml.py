"""Our recipes in the real SparseML and llm-compressor: read, run, and the same weights pruned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.checkpoint import Checkpoint, open_checkpoint
from dlp_deploy.families import FAMILIES
from dlp_deploy.models import load_tokenizer, resolve_model
from dlp_deploy.pruning import prune
from dlp_deploy.recipes.agreement import Agreement, compare, summary
from dlp_deploy.recipes.masks import Masks, open_masks
from dlp_deploy.recipes.oneshot import TOOLS, Outcome, Tool, oneshot
from dlp_deploy.recipes.plan import recipe_from_pruning
from dlp_deploy.recipes.ready_made import ready_made, ready_made_text
from dlp_deploy.recipes.recipe import read_recipe, write_recipe

WINDOWS = {"nsamples": 16, "seqlen": 64, "seed": 0}
PRUNINGS = {
    "dlp": {"method": "wanda"},
    # 3/4 of 64 and of 96 inputs are whole numbers, so that nobody has to round.
    "even": {"method": "wanda", "sparsity": 0.75, "allocation": "uniform"},
    "sparsegpt": {},
    "magnitude": {"method": "magnitude"},
    "mixed": {"method": "wanda", "pattern": "N:8"},
}


@dataclass(frozen=True)
class Pruned:
    """A tiny llama with our recipes and masks for it by name; "int8" is "dlp" with quantization.

    The ready-made recipes are among the recipes, most of them too large for this model.
    """

    model: Path
    recipes: dict[str, Path]
    masks: dict[str, Masks]

    def dense(self) -> Checkpoint:
        return open_checkpoint(resolve_model(str(self.model)))


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory) -> Pruned:
    folder = tmp_path_factory.mktemp("pruned")
    model = tiny_checkpoint("llama")
    recipes, masks = {}, {}
    for name, options in PRUNINGS.items():
        artifact = prune(
            str(model),
            calib="builtin",
            device="cpu",
            output=folder / "artifacts" / name,
            **WINDOWS,
            **options,
        )
        recipes[name] = folder / f"{name}.yaml"
        recipes[name].write_text((artifact / "recipe.yaml").read_text())
        masks[name] = open_masks(artifact / "masks.safetensors")
    pruning = read_manifest(folder / "artifacts" / "dlp").pruning
    recipes["int8"], masks["int8"] = folder / "int8.yaml", masks["dlp"]
    write_recipe(recipes["int8"], recipe_from_pruning(pruning, FAMILIES[0], "int8"))
    for name in ready_made():
        recipes[name] = folder / f"{name}.yaml"
        recipes[name].write_text(ready_made_text(name))
    return Pruned(model, recipes, masks)


@pytest.fixture(scope="module", params=TOOLS)
def tool(request) -> Tool:
    install(request.param)
    return request.param


@pytest.fixture(scope="module")
def outcomes(tool, pruned, tmp_path_factory) -> dict[str, Outcome]:
    """What the tool makes of each recipe with the calibration tokens that we pruned with."""
    windows = calibration_windows("builtin", load_tokenizer(resolve_model(str(pruned.model))), **WINDOWS)
    folder = tmp_path_factory.mktemp(tool)
    made = oneshot(tool, pruned.model, list(pruned.recipes.values()), windows.ids, folder, threads=2)
    return dict(zip(pruned.recipes, made, strict=True))


def weights_of(outcome: Outcome) -> dict[str, torch.Tensor]:
    assert outcome.weights is not None, outcome.error
    return load_file(outcome.weights)


def agreements(pruned: Pruned, outcomes: dict[str, Outcome], name: str) -> list[Agreement]:
    dense, theirs, masks = pruned.dense(), weights_of(outcomes[name]), pruned.masks[name]
    return [
        compare(weight, dense.tensor(weight), masks.mask(weight), theirs[weight]) for weight in masks.names()
    ]


def test_the_tool_reads_every_recipe(pruned, outcomes):
    assert set(outcomes) == {*PRUNINGS, "int8", *ready_made()}
    for name, outcome in outcomes.items():
        ours = tuple(kind for _, kind, _ in read_recipe(pruned.recipes[name]).modifiers())
        assert outcome.kinds == ours


@pytest.mark.parametrize("name", [*PRUNINGS, "int8"])
def test_every_module_gets_the_sparsity_of_ours(pruned, outcomes, name):
    compared = agreements(pruned, outcomes, name)
    assert len(compared) == 3 * 7
    for module in compared:
        assert module.within_rounding, module


@pytest.mark.parametrize("name", ["mixed", "even"])
def test_counts_that_need_no_rounding_are_the_same(pruned, outcomes, name):
    for module in agreements(pruned, outcomes, name):
        assert module.by_count == 0
        assert module.ours == module.theirs


def test_masks_are_the_same_where_counts_are(pruned, outcomes):
    assert summary(agreements(pruned, outcomes, "even")).equal > 0.9995


@pytest.mark.parametrize(
    ("name", "least"),
    [("dlp", 0.97), ("int8", 0.97), ("sparsegpt", 0.995), ("magnitude", 0.999), ("mixed", 0.999)],
)
def test_masks_agree_up_to_rounding(pruned, outcomes, name, least):
    total = summary(agreements(pruned, outcomes, name))
    assert total.equal >= least
    assert total.swapped < 0.01


def test_kept_weights_are_left_as_they_were(pruned, outcomes):
    dense = pruned.dense()
    for weight, values in weights_of(outcomes["dlp"]).items():
        kept = values != 0
        assert (values[kept] == dense.tensor(weight)[kept]).all()


def test_the_uniform_recipe_runs_on_any_model(outcomes):
    for name, weights in weights_of(outcomes["uniform-70"]).items():
        if name != "lm_head.weight":
            assert (weights == 0).float().mean() == pytest.approx(0.7, abs=1 / 64)


def test_the_owl_recipe_spreads_its_sparsity(tool, outcomes):
    if tool == "llmcompressor":  # 0.14 reads the recipe, but calls its own calibration too early
        assert "before initializing" in outcomes["owl-70"].error
        return
    weights = weights_of(outcomes["owl-70"])
    blocks = [weights[f"model.layers.{block}.mlp.up_proj.weight"] for block in range(3)]
    sparsities = [float((block == 0).float().mean()) for block in blocks]
    assert sum(sparsities) / 3 == pytest.approx(0.7, abs=0.02)
    assert max(sparsities) - min(sparsities) == pytest.approx(0.16, abs=0.03), "the range is 2 lambda"


@pytest.mark.parametrize("name", ["llama-7b-dlp-70", "llama2-13b-dlp-70"])
def test_a_recipe_for_another_model_is_refused_by_the_tool_too(outcomes, name):
    assert outcomes[name].weights is None
    assert "sparsities" in outcomes[name].error
