from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlp_deploy.checkpoint import Checkpoint, is_finite, open_checkpoint, shard_name, write_index, write_shard
from dlp_deploy.errors import UserError
from dlp_deploy.models import resolve_model

from .limits import file_size_limit


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(resolve_model(str(folder)))


@pytest.fixture
def sharded_llama(llama_folder: Path) -> Path:
    """The tiny llama in four shards or so, as the hub has large models."""
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    (llama_folder / "model.safetensors").unlink()
    model.save_pretrained(llama_folder, max_shard_size="200KB")
    assert len(list(llama_folder.glob("model-*.safetensors"))) > 2
    return llama_folder


def assert_reads_as(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.tensor(name)
        assert torch.equal(read, tensor), name
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(read.shape), read.dtype)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_reads_what_transformers_saved(kind: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    state = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(kind)).state_dict()
    assert_reads_as(opened(tiny_checkpoint(kind)), state)


def test_tied_head_is_not_among_the_names(tiny_checkpoint: Callable[[str], Path]) -> None:
    assert "lm_head.weight" not in opened(tiny_checkpoint("llama-tied")).names()


def test_names_of_a_base_model_are_completed(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """OPT's own files call model.decoder.layers decoder.layers."""
    folder = shutil.copytree(tiny_checkpoint("opt"), tmp_path / "opt")
    state = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    assert_reads_as(opened(folder), state)


def test_sharding_and_format_do_not_change_tensors_or_digest(
    sharded_llama: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = opened(tiny_checkpoint("llama"))
    state = {name: whole.tensor(name) for name in whole.names()}
    assert_reads_as(opened(sharded_llama), state)
    assert opened(sharded_llama).sha256 == whole.sha256
    for path in sharded_llama.glob("model*"):
        path.unlink()
    torch.save(state, sharded_llama / "pytorch_model.bin")
    assert_reads_as(opened(sharded_llama), state)
    torch.save(state, sharded_llama / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_reads_as(opened(sharded_llama), state)
    assert opened(sharded_llama).sha256 == whole.sha256


def test_missing_shard_is_named(sharded_llama: Path) -> None:
    victim = sorted(sharded_llama.glob("model-*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(UserError, match=r"model-0000\d-of-.*is missing"):
        opened(sharded_llama)


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_truncated_shard_is_named(sharded_llama: Path, kept_bytes: int) -> None:
    victim = sorted(sharded_llama.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:kept_bytes])
    with pytest.raises(UserError, match=f"{victim.name} is truncated"):
        opened(sharded_llama)


def test_truncated_bin_is_named(llama_folder: Path) -> None:
    state = load_file(llama_folder / "model.safetensors")
    (llama_folder / "model.safetensors").unlink()
    path = llama_folder / "pytorch_model.bin"
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is truncated"):
        opened(llama_folder)


def test_bin_with_code_in_it_is_not_run(llama_folder: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (llama_folder / "attacked",))  # type: ignore[return-value]

    (llama_folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Attack()}, llama_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="unsafe to load"):
        opened(llama_folder)
    assert not (llama_folder / "attacked").exists()


def test_index_that_leaves_the_folder(sharded_llama: Path) -> None:
    index = sharded_llama / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"elsewhere\.safetensors is missing"):
        opened(sharded_llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensor_that_is_not_finite_is_named(llama_folder: Path, value: float) -> None:
    state = load_file(llama_folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: tensor .*1\.mlp\.up_proj.* NaN or Inf"):
        opened(llama_folder).tensor("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_written_shards_read_back_everywhere(llama_folder: Path, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) for name, t in load_file(llama_folder / "model.safetensors").items()}
    (llama_folder / "model.safetensors").unlink()
    names = sorted(state)
    for index, part in enumerate((names[:5], names[5:])):
        write_shard(llama_folder / shard_name(index, 2), {name: state[name] for name in part})
    write_index(llama_folder)
    assert_reads_as(opened(llama_folder), state)
    theirs = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())
    index_file = json.loads((llama_folder / "model.safetensors.index.json").read_text())
    assert index_file["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_shard(tmp_path / "a.safetensors", {"t": base.t(), "row": base[1]})
    read = load_file(tmp_path / "a.safetensors")
    assert torch.equal(read["t"], base.t())
    assert torch.equal(read["row"], base[1])


def test_full_disk_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    with file_size_limit(100_000), pytest.raises(UserError, match=r"no room to write .*a\.safetensors"):
        write_shard(tmp_path / "a.safetensors", {"t": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_is_what_torch_says(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    fine = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal], dtype=dtype)
    many = fine.repeat(30_000)
    assert is_finite(many)
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in (0, 90_001, -1):
            spoiled = many.clone()
            spoiled[place] = value
            assert not is_finite(spoiled)
