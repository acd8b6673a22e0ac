"""Masks applied to another checkpoint of their model, and refused for any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model
from dlp_deploy.recipes.masked_checkpoint import apply_masks
from dlp_deploy.recipes.masks import identity_of, mask_of, open_masks, write_masks
from dlp_deploy.recipes.targets import linears_within


def magnitude_masks(model: Path, path: Path, sparsity: float = 0.5) -> Path:
    """Masks of every linear layer of the blocks, by |W| within each row."""
    files = resolve_model(str(model))
    decoder = decoder_of(load_config(files))
    checkpoint = open_checkpoint(files)
    masks = {}
    for linear in linears_within(decoder.family.blocks, decoder):
        weights = checkpoint.tensor(f"{linear}.weight")
        dropped = weights.abs().argsort(dim=1)[:, : int(weights.shape[1] * sparsity)]
        keep = torch.ones_like(weights, dtype=torch.bool).scatter_(1, dropped, False)
        masks[f"{linear}.weight"] = mask_of(keep, weights)
    write_masks(path, masks, identity_of(decoder, files.name, checkpoint.sha256))
    return path


@pytest.fixture(scope="module")
def masks(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return magnitude_masks(tiny_checkpoint("llama"), tmp_path_factory.mktemp("masks") / "masks.safetensors")


def tuned(source: Path, target: Path, change: float, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint with every weight moved by `change` times its layer's spread."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * change)
    model.to(dtype).save_pretrained(target, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_apply_to_a_fine_tune(tiny_checkpoint, masks, tmp_path, dtype):
    source = tuned(tiny_checkpoint("llama"), tmp_path / "tuned", 0.1, dtype)
    applied = apply_masks(masks, str(source), tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    opened = open_masks(masks)
    assert after.keys() == before.keys()
    for name, weights in before.items():
        expected = weights * opened.mask(name) if name in opened.names() else weights
        assert torch.equal(after[name], expected)
        assert after[name].dtype == dtype
    assert applied.masks == len(opened.names()) == 3 * 7
    assert applied.sparsity == pytest.approx(0.5)
    assert applied.zeroed == round(applied.sparsity * applied.weights)


def test_the_result_is_a_whole_checkpoint(tiny_checkpoint, masks, tmp_path):
    apply_masks(masks, str(tiny_checkpoint("llama")), tmp_path / "out")
    text = "The for statement"
    original = AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == original(text)
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_an_unfinished_run_of_that_name_is_left_alone(tiny_checkpoint, masks, tmp_path):
    work = tmp_path / "applied.partial" / "work"
    work.mkdir(parents=True)
    apply_masks(masks, str(tiny_checkpoint("llama")), tmp_path / "applied")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["applied", "applied.partial"]
    assert work.is_dir()


def test_applying_twice_changes_nothing_more(tiny_checkpoint, masks, tmp_path):
    apply_masks(masks, str(tiny_checkpoint("llama")), tmp_path / "once")
    again = apply_masks(masks, str(tmp_path / "once"), tmp_path / "twice")
    assert again.zeroed == 0
    digests = [open_checkpoint(resolve_model(str(tmp_path / name))).sha256 for name in ("once", "twice")]
    assert digests[0] == digests[1]


def test_other_weights_of_the_same_shape_are_refused(tiny_checkpoint, masks, tmp_path):
    other = tuned(tiny_checkpoint("llama"), tmp_path / "other", 30.0)
    with pytest.raises(UserError, match=r"only \d+% of the weights .* another model"):
        apply_masks(masks, str(other), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 2}, "blocks is 3"),
        ({"intermediate_size": 104}, "intermediate is 96"),
        ({"num_key_value_heads": 4}, "kv_heads is 2"),
        ({"rms_norm_eps": 1e-5}, "norm_epsilon"),
    ],
)
def test_models_of_other_sizes_are_refused(tiny_checkpoint, masks, tmp_path, change, named):
    config = LlamaConfig.from_pretrained(tiny_checkpoint("llama"))
    for name, value in change.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=named):
        apply_masks(masks, str(tmp_path / "other"), tmp_path / "out")


def test_another_family_is_refused(tiny_checkpoint, masks, tmp_path):
    with pytest.raises(UserError, match="family is llama in llama, qwen2 in qwen2"):
        apply_masks(masks, str(tiny_checkpoint("qwen2")), tmp_path / "out")


def test_an_existing_output_is_kept(tiny_checkpoint, masks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        apply_masks(masks, str(tiny_checkpoint("llama")), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    apply_masks(masks, str(tiny_checkpoint("llama")), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_damaged_checkpoint_leaves_nothing(llama_folder, masks, tmp_path):
    source = tmp_path / "broken"
    shutil.copytree(llama_folder, source)
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        apply_masks(masks, str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
