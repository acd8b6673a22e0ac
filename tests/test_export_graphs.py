"""Exported graphs say what torch says: every family, engine and precision, through the KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dlp_deploy.artifact import Precision, read_manifest
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export import export
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.grid import Grid
from dlp_deploy.export.onnxruntime import computes_windows
from dlp_deploy.export.plan import Graph, plan_graphs
from dlp_deploy.export.quantize import quantize
from dlp_deploy.export.rotary import rotary_tables
from dlp_deploy.export.verify import (
    MEAN_ERROR,
    VerificationError,
    check_structure,
    count_zeros,
    graph_logits,
)
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model

from .artifacts import pruned
from .tiny_models import LLAMA3_ROPE, SIZES, TINY_CONFIGS, save_tiny_model, torch_model

IDS = np.random.default_rng(0).integers(0, 500, 40)
PROMPT = 24
# Those whose graphs are ONNX.
ENGINES = ("deepsparse", "onnxruntime")


def exported(folder: Path, checkpoint: Path, engine: Any, precision: Any) -> Path:
    files = resolve_model(str(checkpoint))
    config = load_config(files)
    decoder = decoder_of(config)
    weights = Weights(open_checkpoint(files), decoder)
    graph = Graph(engine, precision, False, engine)
    return write_graph(folder / f"{engine}-{precision}", graph, weights, decoder, config, lambda: None).model


def torch_logits(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0, PROMPT - 1 :].numpy()


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_fp32_logits_are_those_of_torch(
    kind: str, engine: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    windowed = any(decoder_of(load_config(resolve_model(str(tiny_checkpoint(kind))))).windows)
    if engine == "onnxruntime" and windowed and not computes_windows():
        with pytest.raises(UserError, match="computes sliding windows wrongly"):
            exported(tmp_path, tiny_checkpoint(kind), engine, "fp32")
        return
    model = exported(tmp_path, tiny_checkpoint(kind), engine, "fp32")
    check_structure(model, engine)
    expected = torch_logits(torch_model(tiny_checkpoint(kind)))
    assert relative_error(graph_logits(model, IDS, PROMPT), expected) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_cache_holds_key_value_heads_alone(
    engine: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    config = load_config(resolve_model(str(tiny_checkpoint("llama"))))
    assert config.num_key_value_heads < config.num_attention_heads
    model = onnx.load(exported(tmp_path, tiny_checkpoint("llama"), engine, "fp32"), load_external_data=False)
    pasts = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    assert len(pasts) == 2 * config.num_hidden_layers
    assert {past.type.tensor_type.shape.dim[1].dim_value for past in pasts} == {config.num_key_value_heads}


def fake_quantized(checkpoint: Path) -> torch.nn.Module:
    """The int8 scheme written a second time, in torch: weights per channel, inputs per token."""
    model = torch_model(checkpoint)

    def quantize_input(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127
        return (torch.round(inputs[0] / scale) * scale,)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            restored = quantize(module.weight.detach().numpy(), Grid(8)).dequantize()
            module.weight = torch.nn.Parameter(torch.from_numpy(restored))
            module.register_forward_pre_hook(quantize_input)
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen3", "gemma2", "phi3", "opt"])
def test_int8_for_deepsparse_is_the_scheme_it_claims(
    kind: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    logits = graph_logits(exported(tmp_path, tiny_checkpoint(kind), "deepsparse", "int8"), IDS, PROMPT)
    # A sum that differs in its last bit may round an activation to the next step.
    assert relative_error(logits, torch_logits(fake_quantized(tiny_checkpoint(kind)))) < 2e-2
    assert relative_error(logits, torch_logits(torch_model(tiny_checkpoint(kind)))) > 1e-4


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.25), ("int4", 0.9)])
@pytest.mark.parametrize("engine", ENGINES)
def test_quantized_logits_stay_near_torch(
    engine: str, precision: str, limit: float, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model = exported(tmp_path, tiny_checkpoint("llama"), engine, precision)
    check_structure(model, engine)
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")))
    assert relative_error(graph_logits(model, IDS, PROMPT), expected) < limit


@pytest.fixture
def half_zero(tmp_path: Path, llama_folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
                linear.weight *= torch.arange(linear.weight.numel()).reshape(linear.weight.shape) % 2
    model.save_pretrained(llama_folder)
    return llama_folder


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("engine", ENGINES)
def test_pruned_weights_stay_zero_in_every_precision(
    engine: str, precision: str, tmp_path: Path, half_zero: Path
) -> None:
    files = resolve_model(str(half_zero))
    decoder = decoder_of(load_config(files))
    weights = Weights(open_checkpoint(files), decoder)
    counted = count_zeros(exported(tmp_path, half_zero, engine, precision), weights, decoder)
    pruned = sum(
        int((weights.linear(f"{decoder.family.block(block)}.{part}") == 0).sum())
        for block in range(decoder.blocks)
        for part in decoder.family.linears
    )
    assert counted.pruned == pruned > 0
    assert counted.zeros >= pruned
    assert counted.zeros == pruned or precision != "fp32"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pruned_weight_that_is_not_zero_is_found(engine: str, tmp_path: Path, half_zero: Path) -> None:
    model = exported(tmp_path, half_zero, engine, "int8")
    graph = onnx.load(str(model), load_external_data=False).graph
    (stored,) = (entry for entry in graph.initializer if entry.name == "model.layers.1.mlp.down_proj.weight")
    offset = next(int(entry.value) for entry in stored.external_data if entry.key == "offset")
    with (model.parent / "model.onnx.data").open("r+b") as data:
        data.seek(offset)
        data.write(b"\x01")
    files = resolve_model(str(half_zero))
    decoder = decoder_of(load_config(files))
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        count_zeros(model, Weights(open_checkpoint(files), decoder), decoder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        LLAMA3_ROPE,
    ],
)
def test_scaled_rotary_tables_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = TINY_CONFIGS["llama"]()
    config.rope_scaling = scaling
    config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_config(config)
    cosine, sine = rotary_tables(config, decoder_of(config), 100)
    theirs = model.model.rotary_emb(torch.zeros(1), torch.arange(100)[None])
    np.testing.assert_allclose(np.tile(cosine, 2), theirs[0][0], atol=1e-5)
    np.testing.assert_allclose(np.tile(sine, 2), theirs[1][0], atol=1e-5)


def test_plan_puts_the_first_precision_under_the_engines_name() -> None:
    folders = [graph.folder for graph in plan_graphs("int8,fp32", "deepsparse,onnxruntime", "fp32")]
    assert folders == ["deepsparse", "deepsparse-fp32", "onnxruntime", "onnxruntime-fp32", "baseline/fp32"]
    assert [graph.folder for graph in plan_graphs("fp32", "deepsparse", "none")] == ["deepsparse"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("int7", "deepsparse", "fp32"), "int7"),
        (("int8", "tvm", "fp32"), "tvm"),
        (("int8", "", "fp32"), "--target"),
    ],
)
def test_unknown_names_are_refused_by_name(arguments: tuple[str, str, str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        plan_graphs(*arguments)


def test_dense_baselines_have_the_fastest_blocks_unless_told() -> None:
    assert [graph.block_size for graph in plan_graphs("int4", "onnxruntime", "int4")] == [32, 128]
    assert [graph.block_size for graph in plan_graphs("int4", "onnxruntime", "int4", block_size=64)] == [
        64,
        64,
    ]


def test_rounding_is_chosen_on_text_where_it_matters() -> None:
    def chosen_on_text(**options: Any) -> list[str]:
        graphs = plan_graphs("int8,int4", "deepsparse,onnxruntime", "none", **options)
        return [graph.folder for graph in graphs if graph.calibrated]

    assert chosen_on_text() == ["deepsparse", "deepsparse-int4", "onnxruntime-int4"]
    assert chosen_on_text(rounding="nearest") == []


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
def test_the_block_size_asked_for_is_in_the_graph_which_is_verified(
    block_size: int, precision: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    # Layers of 256 and 512 inputs, so that every block is a whole one.
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    model = save_tiny_model(tmp_path / "model", LlamaConfig(**sizes), tiny_tokenizer)
    artifact = pruned(model, tmp_path / "artifact")
    export(artifact, precision, "onnxruntime", "none", rounding="nearest", block_size=block_size)
    (made,) = read_manifest(artifact).exports
    assert made.block_size == block_size
    assert [(check.engine, check.reference) for check in made.checks] == [("onnxruntime", "torch")]
    assert made.checks[0].mean_rel_error <= MEAN_ERROR[precision]
    graph = onnx.load(str(artifact / made.path / "model.onnx"), load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    scales = {entry.name: entry for entry in graph.initializer}
    assert len(products) == 2 * 7 + 1
    for node in products:
        asked = {attribute.name: attribute.i for attribute in node.attribute}
        assert (asked["block_size"], asked["accuracy_level"]) == (block_size, 4)
        assert asked["bits"] == (8 if precision == "int8" else 4)
        assert np.prod(scales[node.input[2]].dims) == asked["N"] * asked["K"] // block_size


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_onnxruntime_runs_norms_and_attention_as_one_operator_each(
    kind: str, tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    model = exported(tmp_path, tiny_checkpoint(kind), "onnxruntime", "int4")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False).graph.node
    found = Counter(node.op_type for node in nodes)
    blocks = load_config(resolve_model(str(tiny_checkpoint(kind)))).num_hidden_layers
    assert found["GroupQueryAttention"] == blocks
    # The first norm, and those of heads; the others come behind a sum.
    single = {"llama": 1, "qwen3": 1 + 2 * blocks}[kind]
    assert found["SkipSimplifiedLayerNormalization"] == 2 * blocks
    assert found["SimplifiedLayerNormalization"] == single
    assert not found.keys() & {"ReduceMean", "Sqrt", "Pow"}


def test_a_tied_head_is_stored_once_in_fp32_for_onnxruntime(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    checkpoint = tiny_checkpoint("llama-tied")
    config = load_config(resolve_model(str(checkpoint)))
    table = 4 * config.vocab_size * config.hidden_size
    sizes = {}
    for engine in ENGINES:
        model = exported(tmp_path, checkpoint, engine, "fp32")
        sizes[engine] = model.with_name("model.onnx.data").stat().st_size
    assert sizes["deepsparse"] - sizes["onnxruntime"] > 0.9 * table


def test_layers_are_kept_in_sparse_graphs_only() -> None:
    graphs = plan_graphs("int4", "onnxruntime", "int4", keep_fp32="lm_head")
    assert [(graph.dense, graph.keep_fp32) for graph in graphs] == [(False, "lm_head"), (True, "none")]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("int4", "none", "int4"), {"keep_fp32": "lm_head"}, "--keep-fp32 is for quantized"),
        (("fp32", "onnxruntime", "int4"), {"keep_fp32": "auto"}, "--keep-fp32 is for quantized"),
        (("int8", "deepsparse", "fp32"), {"block_size": 64}, "--block-size 64 is for ONNX Runtime's int8"),
    ],
)
def test_options_that_mean_nothing_to_any_graph_are_refused(
    arguments: tuple[str, str, str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_graphs(*arguments, **options)


def test_layers_narrower_than_a_block_are_read_by_their_bits(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Their packed 4 bit rows have as many bytes as the layers have inputs."""
    artifact = pruned(tiny_checkpoint("llama"), tmp_path / "artifact")
    export(artifact, "int4", "onnxruntime", "none", rounding="nearest", block_size=256)
    manifest = read_manifest(artifact)
    (made,) = manifest.exports
    assert made.sparsity - made.rounded_to_zero == pytest.approx(manifest.pruning.sparsity)
