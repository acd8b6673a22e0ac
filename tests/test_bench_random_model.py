"""Models of real shapes with random weights: their sizes, and that they are what torch runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dlp_deploy.bench.random_model import RandomModel, graph_bytes, parameter_shapes
from dlp_deploy.bench.shapes import SHAPES, shape_config
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.export.verify import compare_logits, graph_logits
from dlp_deploy.families import decoder_of
from dlp_deploy.models import resolve_model


def test_random_weights_are_those_of_the_model_that_torch_runs(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    shape = str(tiny_checkpoint("llama"))
    random = RandomModel(shape_config(shape), 0.6, 1)
    weights = random.checkpoint()
    stored = open_checkpoint(resolve_model(shape))
    assert {name: weights.shape(name) for name in weights.names()} == {
        name: stored.shape(name) for name in stored.names()
    }
    layer = weights.tensor("model.layers.1.mlp.up_proj.weight")
    assert float((layer == 0).float().mean()) == pytest.approx(0.6, abs=0.03)
    assert torch.equal(layer, random.checkpoint().tensor("model.layers.1.mlp.up_proj.weight"))
    assert bool((weights.tensor("lm_head.weight") != 0).all())

    ids = np.random.default_rng(0).integers(0, 512, 24)
    model = AutoModelForCausalLM.from_config(random.config).eval()
    model.load_state_dict({name: weights.tensor(name) for name in weights.names()})
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()[15:]
    reference = random.reference(tmp_path / "torch", ids, 16)
    np.testing.assert_allclose(reference.logits, expected, rtol=1e-3, atol=1e-5)
    written = random.write(tmp_path / "graph", "onnxruntime", "fp32")
    check = compare_logits("onnxruntime", "torch", graph_logits(written.model, ids, 16), expected)
    assert check.max_rel_error < 1e-4


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_shapes_have_the_published_numbers_of_parameters(shape: str, parameters: int) -> None:
    shapes = parameter_shapes(shape_config(shape))
    assert sum(int(np.prod(size)) for size in shapes.values()) == parameters


def test_every_shape_is_one_that_graphs_are_written_for(tmp_path: Path) -> None:
    for name in SHAPES:
        assert decoder_of(shape_config(name, blocks=2)).blocks == 2
    config = shape_config("smollm2-135m", blocks=1)
    for engine in ("deepsparse", "llamacpp", "onnxruntime"):
        for precision in ("fp32", "int8", "int4"):
            written = RandomModel(config, 0.5, 0).write(tmp_path / engine, engine, precision)  # type: ignore[arg-type]
            assert graph_bytes(config, engine, precision) == pytest.approx(written.weight_bytes, rel=0.05)
