"""llama.cpp: the GGUF files written for it say what torch says, and it counts as a dense baseline."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from hypothesis import given
from hypothesis import strategies as st

from dlp_deploy.artifact import read_manifest
from dlp_deploy.bench import bench
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.plan import plan_runs
from dlp_deploy.bench.roofline import gguf_traffic
from dlp_deploy.bench.worker import EngineWorker, WorkerError
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.evaluation import evaluate
from dlp_deploy.export import export
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.gguf import pack_q4_0
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.plan import Graph, plan_graphs
from dlp_deploy.export.quantize import quantize
from dlp_deploy.export.write import Written, write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model

from .bench_artifacts import exported_artifact
from .tiny_models import torch_model

IDS = np.random.default_rng(0).integers(0, 500, 90)
PROMPT = 70
# What llama.cpp knows, each with something of its own: grouped and tied heads, scaled rotation, wide heads,
# biases, norms of queries and keys, heads that are no power of two.
KNOWN = ("llama", "llama3.2", "mistral", "qwen2", "qwen2.5-tied", "qwen3", "llama-bias", "heads-of-24")
QUICK: dict[str, Any] = {"cores": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 1}


def write(checkpoint: Path, folder: Path, precision: str, kept: Collection[str] = ()) -> Written:
    files = resolve_model(str(checkpoint))
    config = load_config(files)
    decoder = decoder_of(config)
    graph = Graph("llamacpp", precision, False, "llamacpp", "nearest")  # type: ignore[arg-type]
    weights = Weights(open_checkpoint(files), decoder)
    return write_graph(folder, graph, weights, decoder, config, lambda: None, kept)


def logits_in_torch(folder: Path) -> np.ndarray:
    with torch.inference_mode():
        return torch_model(folder)(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.fixture
def worker() -> Any:
    install("llamacpp")
    with EngineWorker.spawn(engine_named("llamacpp"), [min(os.sched_getaffinity(0))]) as started:
        yield started


@pytest.mark.parametrize("kind", KNOWN)
def test_every_family_that_it_knows_says_what_torch_says(
    kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, worker: EngineWorker
) -> None:
    expected = logits_in_torch(tiny_checkpoint(kind))
    worker.load(write(tiny_checkpoint(kind), tmp_path, "fp32").model, len(IDS), PROMPT)
    error = np.abs(worker.logits(IDS, PROMPT) - expected[PROMPT - 1 :])
    assert error.max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_file_is_run_as_its_weights_say(
    precision: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, worker: EngineWorker
) -> None:
    """Against torch on the weights that gguf's own reader finds in the file; qwen2 rows are not permuted."""
    written = write(tiny_checkpoint("qwen2"), tmp_path, precision)
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(written.model).tensors}
    model = torch_model(tiny_checkpoint("qwen2"))
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    with torch.inference_mode():
        exact = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
        model.model.embed_tokens.weight.copy_(torch.from_numpy(stored["token_embd.weight"]))
        model.lm_head.weight.copy_(torch.from_numpy(stored["output.weight"]))
        for index, block in enumerate(model.model.layers):
            for name, layer in block.named_modules():
                if isinstance(layer, torch.nn.Linear):
                    found = stored[f"blk.{index}.{names[name.split('.')[-1]]}.weight"]
                    layer.weight.copy_(torch.from_numpy(found))
        expected = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    worker.load(written.model, len(IDS), PROMPT)
    logits = worker.logits(IDS, PROMPT)
    # Activations are rounded to 8 bits, which is as much as the rounding of 8 bit weights.
    activations = np.abs(logits - expected[PROMPT - 1 :]).mean() / np.abs(expected).max()
    assert activations < 0.02
    assert np.abs(expected - exact).mean() / np.abs(exact).max() < (0.01 if precision == "int8" else 0.1)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tied_head_that_is_kept_is_kept(
    precision: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("qwen2.5-tied")
    written = write(checkpoint, tmp_path, precision, kept=("lm_head",))
    (head,) = [t for t in GGUFReader(written.model).tensors if t.name == "output.weight"]
    np.testing.assert_array_equal(head.data, torch_model(checkpoint).lm_head.weight.detach())


@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_4_bit_blocks_are_read_by_gguf_as_they_were_meant(rows: int, blocks: int, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, 32 * blocks)).astype(np.float32)
    weight[:, ::3] = 0
    quantized = quantize(weight, Grid(4, 32))
    found = dequantize(pack_q4_0(quantized), GGMLQuantizationType.Q4_0)
    # Scales are stored in float16.
    np.testing.assert_allclose(found, quantized.dequantize(), rtol=2**-10)
    assert not found[weight == 0].any()


@pytest.mark.parametrize(
    ("kind", "why"), [("gemma", "gemma models are not written"), ("mistral-windowed", "sliding windows")]
)
def test_other_models_are_refused(
    kind: str, why: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{why}.* leave out llamacpp"):
        write(tiny_checkpoint(kind), tmp_path, "int8")


def test_a_file_that_it_cannot_load_is_an_error_with_its_reason(tmp_path: Path, worker: EngineWorker) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(WorkerError, match=r"llamacpp \(load\).*cannot load .*model\.gguf: \S+"):
        worker.load(tmp_path / "model.gguf", 16, 8)


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse graph for llama.cpp, and dense ones for ONNX Runtime too."""
    install("llamacpp")
    return exported_artifact(
        tiny_checkpoint("llama"),
        tmp_path_factory.mktemp("artifacts") / "tiny-s70",
        quant="int8",
        target="llamacpp",
        baseline="llamacpp-int8,fp32,llamacpp-int4",
    )


def test_an_export_is_checked_in_llama_cpp(artifact: Path) -> None:
    found = read_manifest(artifact).export_for("llamacpp", "int4", dense=True)
    assert found is not None
    assert (found.path, found.opset, found.rounding, found.block_size) == (
        "baseline/llamacpp-int4",
        None,
        "gptq",
        32,
    )
    assert [(check.engine, check.reference) for check in found.checks] == [("llamacpp", "torch")]
    assert (artifact / found.path / "tokenizer.json").is_file()
    assert any("no vocabulary" in note for note in found.notes)


def test_pruned_weights_stay_zero(artifact: Path) -> None:
    found = read_manifest(artifact).export_for("llamacpp", "int8", dense=False)
    assert found is not None
    assert found.sparsity >= 0.69


def test_its_dense_runs_are_baselines_of_the_report(artifact: Path, tmp_path: Path) -> None:
    report = bench(
        artifact,
        engine="llamacpp",
        baseline="fp32,llamacpp-int8,llamacpp-int4",
        eval_windows=1,
        eval_tokens=32,
        output=tmp_path / "report.json",
        **QUICK,
    )
    assert {run.name: run.status for run in report.runs} == {
        "onnxruntime-fp32-dense": "ok",
        "llamacpp-int8-dense": "ok",
        "llamacpp-int4-dense": "ok",
        "llamacpp-int8-s70": "ok",
    }
    assert report.dense_fp32 == "onnxruntime-fp32-dense"
    dense = {run.name: run.tpot_ms.p50 for run in report.runs if run.dense and run.tpot_ms}
    assert report.best_dense == min(dense, key=lambda name: dense[name])
    assert report.speedup_over("llamacpp-int8-s70", "llamacpp-int4-dense")
    assert report.run("llamacpp-int8-dense").perplexity == pytest.approx(
        report.run("onnxruntime-fp32-dense").perplexity, rel=0.1
    )
    eight, four = (report.run(f"llamacpp-{precision}-dense").roofline for precision in ("int8", "int4"))
    assert eight is not None
    assert four is not None
    assert eight.operations == four.operations
    assert eight.weight_bytes > four.weight_bytes
    assert "AVX2" in report.environment.engines["llamacpp"].versions["built for"]


def test_what_a_token_reads_of_a_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    decoder = decoder_of(load_config(resolve_model(str(tiny_checkpoint("llama")))))
    traffic = gguf_traffic(write(tiny_checkpoint("llama"), tmp_path, "int8").model, decoder)
    matrices = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3) + 512 * 64
    assert traffic.operations == 2 * matrices
    assert traffic.weight_bytes == matrices * 34 // 32 + 4 * 64 * 7
    assert traffic.position_bytes == 2 * 2 * 3 * 2 * 16


def test_perplexity_of_a_dense_file_by_name(artifact: Path) -> None:
    options: dict[str, Any] = {"data": "builtin", "windows": 2, "seqlen": 32, "cores": 1}
    eight = evaluate(str(artifact), engine="llamacpp", dense=True, **options)
    exact = evaluate(str(artifact), engine="onnxruntime", dense=True, **options)
    assert (eight.precision, exact.precision) == ("int8", "fp32")
    assert eight.perplexity == pytest.approx(exact.perplexity, rel=0.1)


def test_without_the_engine(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody asked for is left out, and what cannot be checked is not written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = read_manifest(artifact)
    names = [run.name for run in plan_runs(artifact, manifest, "torch", None)]
    assert names == ["onnxruntime-fp32-dense", "torch-fp32-s70"]
    for engine, baseline in (("llamacpp", None), ("torch", "llamacpp-int8")):
        with pytest.raises(UserError, match="dlp-deploy engine install llamacpp"):
            plan_runs(artifact, manifest, engine, baseline)
    with pytest.raises(UserError, match="dlp-deploy engine install llamacpp"):
        export(artifact, target="none", baseline="llamacpp-int8", force=True)
    assert (artifact / "baseline/llamacpp-int8/model.gguf").is_file()


def test_names_of_baselines() -> None:
    graphs = plan_graphs("int8", "none", "int4,llamacpp-int4")
    assert [(graph.engine, graph.precision, graph.folder, graph.dense) for graph in graphs] == [
        ("onnxruntime", "int4", "baseline/int4", True),
        ("llamacpp", "int4", "baseline/llamacpp-int4", True),
    ]
    with pytest.raises(UserError, match=r"--baseline deepsparse-int8 is not known; .*llamacpp-int8"):
        plan_graphs("int8", "none", "deepsparse-int8")
    with pytest.raises(UserError, match="leave nothing to export"):
        plan_graphs("int8", "none", "none")
