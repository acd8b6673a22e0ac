"""--head-sparsity: the output head pruned like the blocks, and held to that wherever the model goes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig

from dlp_deploy import evaluate, export, finetune, pack, pruning, unpack
from dlp_deploy.artifact import CHECKPOINT, MANIFEST, MASKS, check_files, list_files, read_manifest
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.plan import plan_runs
from dlp_deploy.blocks import logits_of
from dlp_deploy.calibration import calibration_windows
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export import publish
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.plan import Graph
from dlp_deploy.export.verify import VerificationError, count_zeros
from dlp_deploy.export.write import Written, write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.masking import METHODS, kept_of, parse_pattern
from dlp_deploy.models import load_config, resolve_model
from dlp_deploy.pruning import prune
from dlp_deploy.recipes.commands import apply
from dlp_deploy.recipes.masks import open_masks

from .artifacts import with_graphs
from .tiny_models import SIZES, TINY_CONFIGS, VOCABULARY, save_tiny_model, torch_model

Run = Callable[..., tuple[int, str, str]]
Checkpoints = Callable[[str], Path]

TEXT: dict[str, Any] = {"calib": "builtin", "nsamples": 5, "seqlen": 48}
SMALL: dict[str, Any] = TEXT | {"sparsity": 0.6, "method": "wanda"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OLD_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY}


@pytest.fixture(scope="module")
def tied(tiny_checkpoint: Checkpoints) -> Path:
    """A dense model whose embedding serves as head."""
    return tiny_checkpoint("llama-tied")


@pytest.fixture(scope="module")
def artifact(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with half of a head of its own, which Wanda leaves as it was; not to be altered."""
    return prune(str(tied), head_sparsity=0.5, output=tmp_path_factory.mktemp("head") / "artifact", **SMALL)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(resolve_model(str(folder)))
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def digests(folder: Path) -> dict[str, str]:
    """All files but the manifest."""
    return {file.path: file.sha256 for file in list_files(folder)}


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_every_family_has_a_sparse_head_of_its_own(
    kind: str, tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    source = tiny_checkpoint(kind)
    folder = prune(str(source), head_sparsity=0.5, output=tmp_path / "pruned", **SMALL)
    dense, found = weights_of(source), weights_of(folder / CHECKPOINT)
    decoder = decoder_of(load_config(resolve_model(str(source))))
    embedding = f"{decoder.family.embedding}.weight"
    assert found.keys() == dense.keys() | {HEAD}
    assert torch.equal(found[embedding], dense[embedding])
    keep = open_masks(folder / MASKS).mask(HEAD)
    assert torch.equal(found[HEAD], dense.get(HEAD, dense[embedding]).masked_fill(~keep, 0))
    assert json.loads((folder / CHECKPOINT / "config.json").read_text())["tie_word_embeddings"] is False

    pruning = read_manifest(folder).pruning
    assert pruning.head is not None
    assert (pruning.head.asked, pruning.head.measured) == (0.5, 0.5)
    assert (pruning.head.weights, pruning.head.untied) == (keep.numel(), decoder.tied_embeddings)
    assert int((~keep).sum()) == keep.numel() // 2
    assert pruning.sparsity == pytest.approx(0.6, abs=1e-3)
    assert read_manifest(folder).source.sha256 == open_checkpoint(resolve_model(str(source))).sha256
    check_files(folder, read_manifest(folder))

    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    model = torch_model(folder / CHECKPOINT)
    assert torch.equal(model.state_dict()[HEAD], found[HEAD])
    with torch.no_grad():
        expected = model(ids).logits
    logits = torch.stack(list(logits_of(resolve_model(str(folder / CHECKPOINT)), ids)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_the_head_is_as_without_it(artifact: Path, tied: Path, tmp_path: Path) -> None:
    plain = prune(str(tied), output=tmp_path / "plain", **SMALL)
    assert read_manifest(plain).pruning.blocks == read_manifest(artifact).pruning.blocks
    assert '"head"' not in (plain / MANIFEST).read_text()
    masks, others = open_masks(plain / MASKS), open_masks(artifact / MASKS)
    assert others.names() == [*masks.names(), HEAD]
    assert all(torch.equal(masks.mask(name), others.mask(name)) for name in masks.names())
    before, after = weights_of(plain / CHECKPOINT), weights_of(artifact / CHECKPOINT)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert (plain / "recipe.yaml").read_bytes() == (artifact / "recipe.yaml").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_method_sees_what_the_pruned_blocks_and_the_norm_make_of_the_text(
    method: str, tiny_checkpoint: Checkpoints, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    source = tiny_checkpoint("gemma2")
    folder = prune(str(source), head_sparsity=0.7, output=tmp_path / "pruned", **SMALL | {"method": method})
    ids = calibration_windows("builtin", tiny_tokenizer, TEXT["nsamples"], TEXT["seqlen"], 0).ids
    with torch.no_grad():
        states = torch_model(folder / CHECKPOINT).model(ids).last_hidden_state.flatten(0, 1)
    inputs = {"nothing": None, "norms": states.norm(dim=0), "gram": states.T @ states}
    dense = weights_of(source)[EMBEDDING]
    known = inputs[METHODS[method].inputs]
    expected = METHODS[method].prune(dense.clone(), known, 0.7, parse_pattern("unstructured"))
    keep = open_masks(folder / MASKS).mask(HEAD)
    assert int(keep.sum()) == kept_of(keep.numel(), 0.7)
    # Sums in another order may swap weights that are nearly equal.
    assert (keep == expected.keep).float().mean() > 0.999
    weight = dense if expected.weight is None else expected.weight
    same = keep & expected.keep
    torch.testing.assert_close(
        weights_of(folder / CHECKPOINT)[HEAD][same], weight[same], rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize(("pattern", "pruned"), [("2:4", 2), ("N:8", 3)])
def test_the_head_has_the_pattern_of_the_blocks(
    pattern: str, pruned: int, tied: Path, tmp_path: Path
) -> None:
    group = int(pattern[2:])
    options = SMALL | {"sparsity": 0.5, "allocation": "uniform", "pattern": pattern}
    folder = prune(str(tied), head_sparsity=pruned / group, output=tmp_path / "pruned", **options)
    keep = open_masks(folder / MASKS).mask(HEAD).reshape(-1, group)
    assert (keep.sum(1) == group - pruned).all()
    head = read_manifest(folder).pruning.head
    assert head is not None
    assert head.measured == head.asked == pruned / group


def test_a_method_that_needs_no_text_reads_none(tied: Path, tmp_path: Path) -> None:
    options = {"method": "magnitude", "allocation": "uniform", "calib": "no such text"}
    folder = prune(str(tied), head_sparsity=0.25, output=tmp_path / "pruned", **options)
    keep = open_masks(folder / MASKS).mask(HEAD)
    weight = weights_of(tied)[EMBEDDING].abs()
    assert weight[keep].min() >= weight[~keep].max()
    assert read_manifest(folder).pruning.calibration is None


KILLED_RUNS = """
import os, signal, sys
from dlp_deploy import pruning

prune_head, fsync = pruning.prune_head, os.fsync

def run(last_call):
    calls = 0
    def deadly(descriptor):
        nonlocal calls
        calls += 1
        if calls == last_call and not os.path.exists(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)
    def from_here_on(run):
        os.fsync = deadly
        prune_head(run)
    pruning.prune_head = from_here_on
    text = {"calib": "builtin", "nsamples": 5, "seqlen": 48, "sparsity": 0.6}
    pruning.prune(sys.argv[1], output=sys.argv[2], head_sparsity=0.5, resume=True, **text)

for last_call in range(1, 100, 2):
    process = os.fork()
    if not process:
        run(last_call)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(status, os.path.exists(sys.argv[2]))
    if status != -signal.SIGKILL:
        break
"""


def test_killed_while_the_head_is_pruned_it_ends_bit_identical(tied: Path, tmp_path: Path) -> None:
    """Kill the process just before some fsync from the head on, later and later."""
    options = SMALL | {"method": "sparsegpt"}
    whole = prune(str(tied), head_sparsity=0.5, output=tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_RUNS, str(tied), str(killed)]
    *deaths, end = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(deaths) >= 4
    assert set(deaths) == {f"{-signal.SIGKILL} False"}
    assert end == "0 True"
    assert digests(killed) == digests(whole)
    before, after = read_manifest(whole).pruning, read_manifest(killed).pruning
    # Behind the last block, each time.
    assert set(after.resumed_from_block) == {3}
    assert after.model_copy(update={"resumed_from_block": ()}) == before


def test_a_run_is_not_resumed_with_another_head(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(run: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "prune_head", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(str(tied), output=tmp_path / "pruned", **SMALL)
    with pytest.raises(UserError, match=r"was begun with head_sparsity None, now it is 0\.5"):
        prune(str(tied), head_sparsity=0.5, resume=True, output=tmp_path / "pruned", **SMALL)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("0", (), "--head-sparsity 0.0 is impossible; give a share between 0 and 1"),
        ("1", (), "--head-sparsity 1.0 is impossible"),
        ("-0.5", (), "--head-sparsity -0.5 is impossible"),
        ("nan", (), "--head-sparsity nan is impossible"),
        ("half", (), "Invalid value for '--head-sparsity'"),
        (
            "0.7",
            ("--pattern", "2:4", "--allocation", "uniform", "--sparsity", "0.5"),
            "pattern 2:4 can prune 0.5 of the head; give that as --head-sparsity",
        ),
        ("0.7", ("--pattern", "N:8"), "pattern N:8 can prune 0.75 of the head"),
        ("0.01", ("--pattern", "N:8"), "pattern N:8 can prune 0.125 of the head"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "prune-export"])
def test_wrong_input_is_one_line(
    command: str, given: str, options: tuple[str, ...], said: str, tied: Path, tmp_path: Path, run: Run
) -> None:
    more = ("--calib", "builtin", "--output", tmp_path / "out", *options)
    more += ("--target", "onnxruntime", "--baseline", "none") if command == "prune-export" else ()
    status, out, errors = run(command, "--model", tied, "--head-sparsity", given, *more)
    assert (status, out) == (2, "")
    assert said in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_class_that_ties_its_head_whatever_its_config_says_is_refused(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    def always(model: GPT2LMHeadModel) -> None:
        model.lm_head.weight = model.transformer.wte.weight

    source = save_tiny_model(tmp_path / "model", GPT2Config(**OLD_SIZES, eos_token_id=0), tiny_tokenizer)
    monkeypatch.setattr(GPT2LMHeadModel, "tie_weights", always)
    options = ("--calib", "builtin", "--output", tmp_path / "pruned", "--head-sparsity", 0.5)
    status, out, errors = run("prune", "--model", source, *options)
    assert (status, out) == (2, "")
    assert "GPT2LMHeadModel cannot have a linear layer with weights of its own as its head" in errors
    assert len(errors.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def zeros_of_head(model: Path) -> np.ndarray:
    """Which weights [out, in] of the head of a graph are zero: of MatMul, or of MatMulNBits of 8 bits."""
    loaded = onnx.load(str(model)).graph
    (stored,) = (numpy_helper.to_array(t) for t in loaded.initializer if t.name == HEAD)
    return stored.reshape(VOCABULARY, -1) == 128 if stored.dtype == np.uint8 else stored.T == 0


def test_zeros_arrive_in_every_engine_and_logits_are_those_of_torch(
    tied: Path, tmp_path: Path, run: Run
) -> None:
    install("deepsparse")
    artifact = tmp_path / "artifact"
    options = ("--method", "sparsegpt", "--calib", "builtin", "--nsamples", 8, "--seqlen", 48)
    graphs = ("--quant", "int8,fp32", "--baseline", "fp32", "--head-sparsity", 0.5)
    status, _, errors = run("prune-export", "--model", tied, "--output", artifact, *options, *graphs)
    assert status == 0, errors
    manifest = read_manifest(artifact)
    keep = open_masks(artifact / MASKS).mask(HEAD).numpy()
    assert [(made.engine, made.precision, made.dense) for made in manifest.exports] == [
        ("deepsparse", "int8", False),
        ("deepsparse", "fp32", False),
        ("onnxruntime", "int8", False),
        ("onnxruntime", "fp32", False),
        ("onnxruntime", "fp32", True),
    ]
    for made in manifest.exports[:4]:
        zeros = zeros_of_head(artifact / made.path / "model.onnx")
        assert zeros[~keep].all(), made.path
        assert zeros.mean() == pytest.approx(0.5, abs=0 if made.precision == "fp32" else 0.1)
        assert made.sparsity - made.rounded_to_zero == pytest.approx(manifest.pruning.sparsity)
        assert {check.engine for check in made.checks} == {"onnxruntime", made.engine}
        if made.precision == "fp32":
            assert all(check.max_rel_error < 1e-4 for check in made.checks)

    text: dict[str, Any] = {"data": "builtin", "windows": 2, "seqlen": 64, "cores": 1}
    in_torch = evaluate(str(artifact), **text).perplexity
    for engine in ("onnxruntime", "deepsparse"):
        found = evaluate(str(artifact), engine=engine, precision="fp32", **text).perplexity
        assert found == pytest.approx(in_torch, rel=1e-4)
        rounded = evaluate(str(artifact), engine=engine, precision="int8", **text).perplexity
        assert rounded == pytest.approx(in_torch, rel=0.1)

    packed = pack(artifact)
    assert digests(unpack(packed, tmp_path / "unpacked")) == digests(artifact)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_zeros_arrive_in_llamacpp_and_would_be_missed(precision: Any, artifact: Path, tmp_path: Path) -> None:
    files = resolve_model(str(artifact / CHECKPOINT))
    config = load_config(files)
    decoder = decoder_of(config)
    weights = Weights(open_checkpoint(files), decoder)
    graph = Graph("llamacpp", precision, False, "")
    model = write_graph(tmp_path, graph, weights, decoder, config, lambda: None).model
    counted = count_zeros(model, weights, decoder, with_head=True)
    assert counted == count_zeros(model, weights, decoder)
    assert counted.pruned / counted.weights == pytest.approx(read_manifest(artifact).pruning.sparsity)

    class Pruned(Weights):
        def zeros(self, layer: str) -> np.ndarray:
            return super().zeros(layer) | (layer == "lm_head")

    others = Pruned(open_checkpoint(files), decoder)
    with pytest.raises(VerificationError, match="pruned weights of lm_head are no longer zero"):
        count_zeros(model, others, decoder, with_head=True)


@pytest.mark.parametrize("quant", ["fp32", "int8"])
def test_a_graph_that_lost_zeros_of_the_head_is_not_published(
    quant: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = prune(str(tied), head_sparsity=0.5, output=tmp_path / "own", **SMALL)
    row, column = (~open_masks(own / MASKS).mask(HEAD)).nonzero()[0].tolist()

    def spoiled(*arguments: Any) -> Written:
        written = write_graph(*arguments)
        tensors = onnx.load(str(written.model), load_external_data=False).graph.initializer
        (stored,) = (tensor for tensor in tensors if tensor.name == HEAD)
        place = {entry.key: entry.value for entry in stored.external_data}
        # [out, in] with 8 bits, [in, out] without.
        at = row * 64 + column if quant == "int8" else 4 * (column * VOCABULARY + row)
        with written.model.with_name("model.onnx.data").open("r+b") as data:
            data.seek(int(place["offset"]) + at)
            data.write(b"\x81" if quant == "int8" else np.float32(1e-30).tobytes())
        return written

    monkeypatch.setattr(publish, "write_graph", spoiled)
    with pytest.raises(VerificationError, match="1 pruned weights of lm_head are no longer zero"):
        export(own, quant=quant, target="onnxruntime", baseline="none", rounding="nearest")
    assert not read_manifest(own).exports
    assert not list(own.glob("onnxruntime*"))


def test_masks_untie_the_model_that_they_are_applied_to(artifact: Path, tied: Path, tmp_path: Path) -> None:
    applied = apply(artifact, str(tied), tmp_path / "applied")
    assert applied.masks == 3 * 7 + 1
    found, expected = weights_of(applied.output), weights_of(artifact / CHECKPOINT)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    model = AutoModelForCausalLM.from_pretrained(applied.output)
    assert torch.equal(model.lm_head.weight, expected[HEAD])
    assert torch.equal(model.model.embed_tokens.weight, expected[EMBEDDING])


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_fine_tuning_leaves_the_head_as_it_was(rank: int | None, artifact: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": "builtin", "nsamples": 16, "seqlen": 32, "eval_windows": 2}
    tuned = finetune(
        artifact, output=tmp_path / "tuned", lora_rank=rank, teacher="dense", dtype="float32", **options
    )
    assert (tuned / MASKS).read_bytes() == (artifact / MASKS).read_bytes()
    before, after = weights_of(artifact / CHECKPOINT), weights_of(tuned / CHECKPOINT)
    assert after.keys() == before.keys()
    assert torch.equal(after[HEAD].view(torch.uint8), before[HEAD].view(torch.uint8))
    assert torch.equal(after[EMBEDDING], before[EMBEDDING])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert read_manifest(tuned).pruning == read_manifest(artifact).pruning
    export(tuned, quant="int8", target="onnxruntime", baseline="none")
    assert read_manifest(tuned).exports[0].sparsity >= read_manifest(tuned).pruning.sparsity


def test_the_bench_counts_the_weights_of_the_new_head(artifact: Path, tmp_path: Path) -> None:
    folder = with_graphs(shutil.copytree(artifact, tmp_path / "artifact"), "fp32", "onnxruntime")
    runs = plan_runs(folder, read_manifest(folder), "torch,onnxruntime", "none")
    of_torch, of_graph = sorted(runs, key=lambda candidate: candidate.engine.name, reverse=True)
    assert of_torch.weight_bytes == sum(
        4 * weight.numel() for weight in weights_of(folder / CHECKPOINT).values()
    )
    assert of_graph.head_sparsity == 0.5


def test_masks_beside_a_bare_checkpoint_are_known_to_have_a_head(artifact: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": "builtin", "nsamples": 4, "seqlen": 32, "eval_windows": 2}
    tuned = finetune(artifact / CHECKPOINT, masks=artifact / MASKS, output=tmp_path / "tuned", **options)
    head = read_manifest(tuned).pruning.head
    assert head is not None
    assert head.measured == 0.5
    assert (weights_of(tuned / CHECKPOINT)[HEAD] == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("config", "head"),
    [(GPTNeoXConfig(**SIZES), "embed_out.weight"), (GPT2Config(**OLD_SIZES, eos_token_id=0), HEAD)],
    ids=["pythia", "gpt2"],
)
def test_families_that_are_not_described(
    config: Any, head: str, tiny_tokenizer: Any, tmp_path: Path, run: Run
) -> None:
    source = save_tiny_model(tmp_path / "model", config, tiny_tokenizer)
    artifact = tmp_path / "artifact"
    text = ("--calib", "builtin", "--nsamples", 4, "--seqlen", 48, "--head-sparsity", 0.5)
    graphs = ("--quant", "fp32,int8", "--target", "onnxruntime", "--baseline", "none")
    status, _, errors = run("prune-export", "--model", source, "--output", artifact, *text, *graphs)
    assert status == 0, errors
    keep = open_masks(artifact / MASKS).mask(head)
    assert keep.float().mean() == 0.5
    weight = AutoModelForCausalLM.from_pretrained(artifact / CHECKPOINT).get_output_embeddings().weight
    assert not weight[~keep].any()
    assert weight[keep].all()
    manifest = read_manifest(artifact)
    assert [made.precision for made in manifest.exports] == ["fp32", "int8"]
    assert manifest.exports[0].checks[0].max_rel_error < 1e-5


def test_weights_keep_their_dtype(tiny_tokenizer: Any, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "half", TINY_CONFIGS["llama-tied"](), tiny_tokenizer, torch.bfloat16)
    folder = prune(
        str(source), head_sparsity=0.5, output=tmp_path / "pruned", **SMALL | {"method": "sparsegpt"}
    )
    (shard,) = (folder / CHECKPOINT).glob("model-00005-of-*.safetensors")
    tensors = load_file(shard)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "model.norm.weight": torch.bfloat16,
        HEAD: torch.bfloat16,
    }
    keep = open_masks(folder / MASKS).mask(HEAD)
    assert not tensors[HEAD][~keep].any()
