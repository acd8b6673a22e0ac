from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlp_deploy.activations import measure_inputs
from dlp_deploy.blocks import BlockModel, logits_of
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.hidden import HiddenStates
from dlp_deploy.models import resolve_model

from .tiny_models import TINY_CONFIGS, torch_model


@pytest.fixture
def windows() -> torch.Tensor:
    """Twelve windows of 250 tokens: a batch of eight and a shorter one."""
    return torch.randint(512, (12, 250), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_logits_are_those_of_transformers(
    kind: str, tiny_checkpoint: Callable[[str], Path], windows: torch.Tensor
) -> None:
    ids = windows[:5, :120]
    with torch.no_grad():
        expected = torch_model(tiny_checkpoint(kind))(ids).logits
    found = torch.stack(list(logits_of(resolve_model(str(tiny_checkpoint(kind))), ids)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "opt"])
def test_inputs_are_measured_in_every_linear_layer(
    kind: str, tiny_checkpoint: Callable[[str], Path], windows: torch.Tensor, tmp_path: Path
) -> None:
    files = resolve_model(str(tiny_checkpoint(kind)))
    model = BlockModel(files, open_checkpoint(files))
    before = HiddenStates(tmp_path / "before", (*windows.shape, 64))
    after = HiddenStates(tmp_path / "after", (*windows.shape, 64))
    for some, states in model.embed(windows):
        before.write(some, states)
    block = model.block(0, model.read_block(0), windows.shape[1])
    inputs = measure_inputs(block, before, "norms", model.device, after)
    gram = measure_inputs(block, before, "gram", model.device)

    reference = torch_model(files.folder)
    seen: dict[str, torch.Tensor] = {}
    for name in model.decoder.family.linears:
        linear = reference.get_submodule(f"{model.decoder.family.block(0)}.{name}")
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        outputs = reference(windows, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after.read(slice(0, 12)), outputs[1], rtol=1e-4, atol=1e-4)
    assert set(inputs.norms()) == set(model.decoder.family.linears)
    for name, norms in inputs.norms().items():
        rows = seen[name].flatten(0, -2).double()
        torch.testing.assert_close(norms.double(), rows.norm(dim=0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gram.of(name).double(), rows.T @ rows, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gram.norms()[name], norms, rtol=1e-4, atol=1e-4)


def test_layers_with_one_input_are_measured_once(
    tiny_checkpoint: Callable[[str], Path], windows: torch.Tensor, tmp_path: Path
) -> None:
    files = resolve_model(str(tiny_checkpoint("llama")))
    model = BlockModel(files, open_checkpoint(files))
    hidden = HiddenStates(tmp_path / "hidden", (*windows.shape, 64))
    inputs = measure_inputs(model.block(0, model.read_block(0), 250), hidden, "norms", model.device)
    assert list(inputs.values) == ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


def test_sizes_by_block(tiny_checkpoint: Callable[[str], Path]) -> None:
    files = resolve_model(str(tiny_checkpoint("llama-bias")))
    model = BlockModel(files, open_checkpoint(files))
    reference = AutoModelForCausalLM.from_pretrained(files.folder)
    assert model.parameters() == sum(p.numel() for p in reference.parameters())
    assert model.prunable_weights() == [2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96] * 3
    assert sorted(model.names()) == sorted(
        [name for index in range(3) for name in model.block_names(index)] + model.outside_names()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 112}, r"gate_proj\.weight is \[96, 64\], but config\.json says \[112, 64\]"),
        ({"num_hidden_layers": 4}, r"calls for tensor model\.layers\.3\..*, which is in no weight file"),
        ({"vocab_size": 500}, r"embed_tokens\.weight is \[512, 64\], but config\.json says \[500, 64\]"),
    ],
)
def test_config_that_disagrees_with_the_weights(
    llama_folder: Path, change: dict[str, int], message: str
) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    config.pop("layer_types", None)
    (llama_folder / "config.json").write_text(json.dumps(config | change))
    files = resolve_model(str(llama_folder))
    with pytest.raises(UserError, match=message):
        BlockModel(files, open_checkpoint(files))
