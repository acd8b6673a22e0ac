"""recipe show, check and apply as functions."""

from __future__ import annotations

import pytest

from dlp_deploy.errors import UserError
from dlp_deploy.recipes import apply, check, show


def recipe_file(tmp_path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text)
    return str(tmp_path / "recipe.yaml")


def test_showing_a_ready_made_recipe():
    assert "32 sparsities, mean 0.7000" in show("llama2-7b-dlp-70")


def test_showing_the_recipe_of_an_artifact(tmp_path):
    recipe_file(tmp_path, "a_stage: {b_modifiers: {WandaPruningModifier: {sparsity: 0.5}}}")
    assert show(tmp_path) == show(tmp_path / "recipe.yaml") == show(str(tmp_path))


@pytest.mark.parametrize("name", ["missing.yaml", "folder/missing.yml"])
def test_a_missing_file_is_not_taken_for_a_name(name):
    with pytest.raises(UserError, match=f"{name}: No such file"):
        show(name)


def test_checking_without_a_model():
    checked = check("llama-7b-dlp-70")
    assert checked.modifiers == ("WandaPruningModifier", "ConstantPruningModifier")
    assert (checked.model, checked.plan, checked.notes) == (None, None, ())


def test_checking_against_a_model(tiny_checkpoint):
    checked = check("uniform-70", str(tiny_checkpoint("llama")))
    assert checked.model == "llama"
    assert checked.plan is not None
    assert checked.plan.sparsities == (0.7, 0.7, 0.7)


def test_a_recipe_for_a_larger_model_is_refused(tiny_checkpoint):
    with pytest.raises(UserError, match=r"llama-7b-dlp-70: .*sparsity: 32 sparsities for 3 matched modules"):
        check("llama-7b-dlp-70", str(tiny_checkpoint("llama")))


def test_a_recipe_that_only_quantizes_has_no_plan(tiny_checkpoint, tmp_path):
    recipe = recipe_file(tmp_path, "a_stage: {b_modifiers: {QuantizationModifier: {scheme: W8A8}}}")
    assert check(recipe, str(tiny_checkpoint("llama"))).plan is None


def test_what_was_not_checked_is_said(tmp_path):
    recipe = recipe_file(
        tmp_path,
        "a_stage: {b_modifiers: {NewModifier: {x: 'eval(1 + 1)'}, MagnitudePruningModifier: "
        "{targets: [Linear], init_sparsity: 0, final_sparsity: 0.5, mask_structure: '2:4'}}}",
    )
    notes = check(recipe).notes
    assert notes[0].startswith("a_stage.b_modifiers.NewModifier: not a kind")
    assert "N:M" in notes[1]
    assert "eval" in notes[2]


def test_applying_the_masks_of_an_artifact_without_any(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"masks\.safetensors: no such mask file"):
        apply(tmp_path, str(tiny_checkpoint("llama")), tmp_path / "out")


def test_applying_a_recipe_prunes_as_it_says(tiny_checkpoint, tmp_path):
    applied = apply(
        "uniform-70",
        str(tiny_checkpoint("llama")),
        tmp_path / "out",
        calib="builtin",
        nsamples=2,
        seqlen=32,
    )
    assert applied.sparsity == pytest.approx(0.7, abs=1e-3)
    assert applied.masks == 3 * 7
    again = apply(tmp_path / "out", str(tiny_checkpoint("llama")), tmp_path / "masked")
    assert again.zeroed == applied.zeroed
    assert "21 masks" in str(again)


def test_applying_a_recipe_that_prunes_nothing(tiny_checkpoint, tmp_path):
    recipe = recipe_file(tmp_path, "a_stage: {b_modifiers: {QuantizationModifier: {scheme: W8A8}}}")
    with pytest.raises(UserError, match="prunes nothing"):
        apply(recipe, str(tiny_checkpoint("llama")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
