"""A damaged or contradictory checkpoint ends in one line that names the file, from prune as from export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dlp_deploy.errors import UserError
from dlp_deploy.export import export
from dlp_deploy.pruning import prune

from .artifacts import pruned
from .limits import file_size_limit


def dlp(folder: Path, output: Path, **options: Any) -> Path:
    return prune(str(folder), 0.6, calib="builtin", nsamples=3, seqlen=32, output=output, **options)


def configured(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 0}, r"config\.json: num_hidden_layers is 0, but must be a positive number"),
        ({"num_attention_heads": "four"}, r"config\.json: num_attention_heads is 'four'"),
        (
            {"num_hidden_layers": 2},
            r"model\.safetensors: config\.json has no place for tensor model\.layers\.2",
        ),
        ({"hidden_size": 48}, r"embed_tokens\.weight is \[512, 64\], but config\.json says \[512, 48\]"),
        ({"attention_bias": True}, r"config\.json calls for tensor .*bias, which is in no weight file"),
        ({"hidden_act": "nonsense"}, r"config\.json describes no model: 'nonsense'"),
        ({"rope_scaling": {"rope_type": "nonsense"}}, r"config\.json describes no model: 'nonsense'"),
        ({"rope_scaling": "linear"}, r"config\.json: 'str' object"),
        ({"model_type": "nonsense"}, r"config\.json: .* does not recognize this architecture"),
    ],
)
def test_config_that_is_wrong(
    settings: dict[str, Any], message: str, llama_folder: Path, tmp_path: Path
) -> None:
    configured(llama_folder, **settings)
    with pytest.raises(UserError, match=message) as caught:
        dlp(llama_folder, tmp_path / "pruned")
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"architectures": ["Lla'])
def test_config_that_is_no_json(text: str, llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: .+"):
        dlp(llama_folder, tmp_path / "pruned")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"]
)
def test_tensor_that_is_not_finite_is_named_wherever_it_is(
    name: str, llama_folder: Path, tmp_path: Path
) -> None:
    path = llama_folder / "model.safetensors"
    state = load_file(path)
    state[name].view(-1)[3] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.safetensors: tensor {name} holds NaN or Inf"):
        dlp(llama_folder, tmp_path / "pruned")


def test_tokenizer_of_another_model(llama_folder: Path, tmp_path: Path) -> None:
    path = llama_folder / "model.safetensors"
    state = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:100].clone()
    save_file(state, path, metadata={"format": "pt"})
    configured(llama_folder, vocab_size=100)
    with pytest.raises(UserError, match=r"token \d+ of its tokenizer is beyond the vocabulary of 100"):
        dlp(llama_folder, tmp_path / "pruned")


@pytest.mark.parametrize("weight_map", [{"model.norm.weight": 3}, ["model.norm.weight"]])
def test_index_that_is_none(weight_map: Any, llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is no index of shards"):
        dlp(llama_folder, tmp_path / "pruned")


def test_full_disk_ends_an_export_and_leaves_the_artifact_whole(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = pruned(tiny_checkpoint("llama"), tmp_path / "pruned")
    manifest = (artifact / "manifest.json").read_bytes()
    options = {"quant": "fp32", "target": "onnxruntime", "baseline": "none"}
    with file_size_limit(300_000), pytest.raises(UserError, match=r"no room to write .*onnxruntime"):
        export(artifact, **options)  # type: ignore[arg-type]
    assert (artifact / "manifest.json").read_bytes() == manifest
    assert not (artifact / "onnxruntime").exists()
    export(artifact, **options)  # type: ignore[arg-type]
    assert (artifact / "onnxruntime" / "model.onnx").is_file()
