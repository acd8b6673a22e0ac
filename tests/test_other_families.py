"""Decoders that families.py does not describe: read off their transformers classes, exported by optimum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    PretrainedConfig,
    StableLmConfig,
    Starcoder2Config,
)

from dlp_deploy.artifact import CHECKPOINT, MASKS, read_manifest
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.blocks import logits_of
from dlp_deploy.export.reference import Reference, read_reference
from dlp_deploy.models import resolve_model
from dlp_deploy.recipes.masks import open_masks

from .tiny_models import SIZES, VOCABULARY, checkpoints, save_tiny_model

Run = Callable[..., tuple[int, str, str]]
Checkpoints = Callable[[str], Path]

OLD_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# With what is peculiar to each: parallel attention and MLP, Conv1D, partial rotary embedding, one key-value
# head, biases with a row for every window (ALiBi), a head with a bias, logits that are scaled.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "pythia": lambda: GPTNeoXConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**OLD_SIZES),
    "stablelm": lambda: StableLmConfig(**SIZES),
    "falcon-7b": lambda: FalconConfig(**SIZES, new_decoder_architecture=False, multi_query=True),
    "falcon-alibi": lambda: FalconConfig(
        **SIZES, new_decoder_architecture=False, multi_query=False, alibi=True
    ),
    "gptj": lambda: GPTJConfig(**OLD_SIZES, rotary_dim=8),
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=3.0),
    "cohere": lambda: CohereConfig(**SIZES | {"tie_word_embeddings": True}, logit_scale=0.25),
    "starcoder2": lambda: Starcoder2Config(**SIZES),
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Checkpoints:
    """`other(kind)`: folder of a tiny model of CONFIGS, made once."""
    return checkpoints(CONFIGS, tmp_path_factory.mktemp("others"), tiny_tokenizer)


def assert_logits_of_transformers(folder: Path) -> None:
    ids = torch.randint(VOCABULARY, (5, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    found = torch.stack(list(logits_of(resolve_model(str(folder)), ids)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_block_by_block_as_transformers_computes_it(kind: str, other: Checkpoints) -> None:
    assert_logits_of_transformers(other(kind))


def test_checkpoint_of_the_base_model_with_the_masks_that_old_releases_stored(
    other: Checkpoints, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_bytes((other("gpt2") / "config.json").read_bytes())
    tensors = load_file(other("gpt2") / "model.safetensors")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    stored |= {f"h.{block}.attn.bias": torch.ones(1, 1, 256, 256).tril() for block in range(3)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    assert_logits_of_transformers(folder)


def exported(model: Path, artifact: Path, run: Run, quant: str) -> None:
    pruning = ("--method", "wanda", "--output", artifact)
    text = ("--calib", "builtin", "--nsamples", 4, "--seqlen", 48)
    export = ("--quant", quant, "--target", "onnxruntime", "--baseline", "none")
    status, _, errors = run("prune-export", "--model", model, *pruning, *text, *export)
    assert status == 0, errors
    assert "holds the whole model in memory" in errors


def perplexity(artifact: Path, run: Run, engine: str, precision: str) -> float:
    text = ("--data", "builtin", "--windows", 1, "--seqlen", 64, "--json")
    status, out, errors = run("eval", artifact, "--engine", engine, "--precision", precision, *text)
    assert status == 0, errors
    return json.loads(out)["perplexity"]


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [
        ("pythia", "int8", 0.05),
        ("gpt2", "int8", 0.05),
        ("stablelm", "int8", 0.05),
        ("falcon-7b", "int4", 0.2),
    ],
)
def test_pruned_exported_verified_and_evaluated(
    kind: str, precision: str, tolerance: float, other: Checkpoints, tmp_path: Path, run: Run
) -> None:
    artifact = tmp_path / "artifact"
    exported(other(kind), artifact, run, f"fp32,{precision}")
    manifest = read_manifest(artifact)
    sparse, rounded = manifest.exports
    assert manifest.pruning.sparsity == pytest.approx(0.7, abs=1e-3)
    assert sparse.sparsity == pytest.approx(manifest.pruning.sparsity)
    assert rounded.sparsity - rounded.rounded_to_zero == pytest.approx(manifest.pruning.sparsity)
    assert rounded.weight_bytes < sparse.weight_bytes
    assert sparse.checks[0].max_rel_error < 1e-5
    assert any("attention is not fused" in note for note in sparse.notes)

    model = AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT).eval()
    masks = open_masks(artifact / MASKS)
    for name in masks.names():
        assert not model.get_parameter(name)[~masks.mask(name)].any()
    reference = read_reference(artifact / sparse.path)
    np.testing.assert_allclose(reference.logits, logits_in_torch(model, reference), rtol=1e-4, atol=1e-4)

    in_torch = perplexity(artifact, run, "torch", "fp32")
    assert perplexity(artifact, run, "onnxruntime", "fp32") == pytest.approx(in_torch, rel=1e-4)
    assert perplexity(artifact, run, "onnxruntime", precision) == pytest.approx(in_torch, rel=tolerance)
    if kind == "gpt2":
        assert_alike_columns(model)
        assert_decoded_alike(artifact, model, reference)


def logits_in_torch(model: Any, reference: Reference) -> np.ndarray:
    with torch.inference_mode():
        logits = model(torch.from_numpy(reference.ids)[None]).logits[0]
    return logits[reference.prompt - 1 :].numpy()


def assert_alike_columns(model: Any) -> None:
    """Wanda compares weights of one output, which is a column of Conv1D's weight."""
    for block in model.transformer.h:
        zeros = (block.mlp.c_fc.weight == 0).sum(0)
        assert zeros.max() - zeros.min() <= 1


def assert_decoded_alike(artifact: Path, model: Any, reference: Reference) -> None:
    """Token by token through the cache, in the worker that is timed and in optimum's own class."""
    graph = artifact / "onnxruntime"
    with EngineWorker.spawn(engine_named("onnxruntime"), sorted(os.sched_getaffinity(0))) as worker:
        worker.load(graph / "model.onnx", context=len(reference.ids), prompt=reference.prompt)
        logits = worker.logits(reference.ids, reference.prompt)
    np.testing.assert_allclose(logits, logits_in_torch(model, reference), rtol=1e-4, atol=1e-4)
    prompt = torch.from_numpy(reference.ids[None, : reference.prompt])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    theirs = ORTModelForCausalLM.from_pretrained(graph).generate(prompt, **options)
    assert torch.equal(theirs, model.generate(prompt, **options))


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("pythia", "deepsparse", "DeepSparse's KV cache does not take its graphs; give --target onnxruntime"),
        (
            "starcoder2",
            "onnxruntime",
            "optimum's exporter does not know Starcoder2ForCausalLM: it can be pruned",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_it_is_pruned(
    kind: str, target: str, message: str, other: Checkpoints, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "artifact"
    status, _, errors = run(
        "prune-export", "--model", other(kind), "--target", target, "--calib", "builtin", "--output", output
    )
    assert status == 2
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_experts_that_not_every_token_goes_through_are_refused(
    tiny_tokenizer: Any, tmp_path: Path, run: Run
) -> None:
    model = save_tiny_model(tmp_path / "mixtral", MixtralConfig(**SIZES, **EXPERTS), tiny_tokenizer)
    status, _, errors = run(
        "prune", "--model", model, "--calib", "builtin", "--output", tmp_path / "artifact"
    )
    assert status == 2
    assert errors.startswith("dlp-deploy: MixtralForCausalLM cannot be pruned block by block: ")
    assert errors.count("\n") == 1
