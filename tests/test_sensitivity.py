"""Keeping layers in fp32: chosen by measurement within a budget, or by name, and real in both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dlp_deploy import export
from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export.calibrated import quantization_text
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.quantize import quantize
from dlp_deploy.export.sensitivity import Cost, choose_kept, measure_costs
from dlp_deploy.models import resolve_model

from .artifacts import pruned
from .tiny_models import TINY_CONFIGS, save_tiny_model, torch_model

costs = st.lists(
    st.builds(Cost, st.tuples(st.uuids().map(str)), st.floats(0, 1), st.integers(1, 10**6)),
    min_size=1,
    max_size=30,
)


@given(costs, st.floats(0, 3))
def test_what_is_kept_fits_the_budget_and_nothing_better_was_left(costs: list[Cost], share: float) -> None:
    kept = choose_kept(costs, Grid(8), share)
    chosen = [cost for cost in costs if cost.layers[0] in kept]
    extra = 3 * sum(cost.weights for cost in chosen)
    budget = share * sum(cost.weights for cost in costs)
    assert extra <= budget
    for cost in costs:
        if cost.layers[0] not in kept:
            better = [c for c in chosen if c.error / c.weights >= cost.error / cost.weights]
            assert 3 * (cost.weights + sum(c.weights for c in better)) > budget


@torch.no_grad()
def block_output(model: torch.nn.Module, index: int, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.model.layers[index].register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    model(ids)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_a_cost_is_how_far_the_block_moves_when_transformers_runs_it(llama_folder: Path) -> None:
    files, model = resolve_model(str(llama_folder)), torch_model(llama_folder)
    text = quantization_text(files, 128).ids
    found = measure_costs(files, open_checkpoint(files), text, Grid(4), Grid(8), inputs=None)
    assert len(found) == 4 * model.config.num_hidden_layers + 1
    exact = block_output(model, 1, text[:4])
    for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        rounded = quantize(linear.weight.detach().numpy(), Grid(4)).dequantize()
        linear.weight = torch.nn.Parameter(torch.from_numpy(rounded))
    moved = block_output(model, 1, text[:4])
    expected = float((moved - exact).square().mean() / exact.square().mean())
    cost = next(cost for cost in found if "model.layers.1.mlp.up_proj" in cost.layers)
    assert cost.error == pytest.approx(expected, rel=1e-3)


def test_kept_layers_are_in_the_manifest_and_both_engines_agree(llama_folder: Path, tmp_path: Path) -> None:
    install("deepsparse")
    artifact = pruned(llama_folder, tmp_path / "artifact")
    export(artifact, quant="int8", baseline="none")
    before = {e.engine: e for e in read_manifest(artifact).exports}
    keep = "lm_head,model.layers.1.self_attn.q_proj"
    export(artifact, quant="int8", baseline="none", keep_fp32=keep, force=True)
    for made in read_manifest(artifact).exports:
        # Query, key and value are one product.
        assert set(made.kept_fp32) == {"lm_head", *(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")}
        assert made.weight_bytes > before[made.engine].weight_bytes
        assert {check.engine for check in made.checks} == {"onnxruntime", made.engine}
        assert made.checks[0].mean_rel_error < 1.5 * before[made.engine].checks[0].mean_rel_error


def test_auto_keeps_what_fits_the_budget(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = TINY_CONFIGS["llama"]()
    config.num_hidden_layers = 8  # 5 % of fewer blocks is less than any layer
    model = save_tiny_model(tmp_path / "model", config, tiny_tokenizer)
    artifact = pruned(model, tmp_path / "artifact")
    export(artifact, quant="int8", target="onnxruntime", baseline="none", keep_fp32="auto")
    (made,) = read_manifest(artifact).exports
    assert made.kept_fp32
    export(artifact, quant="int8", target="onnxruntime", baseline="none", force=True)
    (plain,) = read_manifest(artifact).exports
    assert not plain.kept_fp32
    assert plain.weight_bytes < made.weight_bytes <= 1.06 * plain.weight_bytes


def test_a_name_that_matches_no_layer_is_told(llama_folder: Path, tmp_path: Path) -> None:
    artifact = pruned(llama_folder, tmp_path / "artifact")
    with pytest.raises(UserError, match=r"model\.layer\.0.*matches no linear layer"):
        export(artifact, baseline="none", keep_fp32="model.layer.0.*")
