"""Bytes and operations per token, against counts made in another way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.peak import measure_peak
from dlp_deploy.bench.roofline import Traffic, graph_traffic
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.plan import Graph
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint(request.param)


@pytest.fixture(scope="module")
def traffic(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Traffic]:
    folder = tmp_path_factory.mktemp("graphs")
    files = resolve_model(str(checkpoint))
    config = load_config(files)
    weights = Weights(open_checkpoint(files), decoder_of(config))

    def traffic(engine: str, precision: str, *skipped: float) -> Traffic:
        graph = Graph(engine, precision, True, "")  # type: ignore[arg-type]
        place = folder / f"{engine}-{precision}"
        written = write_graph(place, graph, weights, decoder_of(config), config, lambda: None)
        return graph_traffic(written.model, decoder_of(config), *skipped)

    return traffic


def test_operations_are_those_that_torch_counts(checkpoint: Path, traffic: Callable[..., Traffic]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    past = 40
    with torch.inference_mode():
        cache = model(torch.zeros(1, past, dtype=torch.int64), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    for engine, precision in (("onnxruntime", "fp32"), ("onnxruntime", "int4"), ("deepsparse", "int8")):
        found = traffic(engine, precision)
        # The angles of the rotary embedding, a table in our graphs, are a tiny product in torch.
        assert found.operations + (past + 1) * found.position_operations == pytest.approx(
            counter.get_total_flops(), rel=2e-3
        )


def test_weights_are_read_once_and_tables_not_at_all(
    checkpoint: Path, traffic: Callable[..., Traffic]
) -> None:
    tensors = open_checkpoint(resolve_model(str(checkpoint)))
    table = {"model.embed_tokens.weight"} if "lm_head.weight" in tensors.names() else set()
    read = sum(tensors.tensor(name).numel() for name in set(tensors.names()) - table)
    # A few scalars of the graph come with it.
    assert traffic("onnxruntime", "fp32").weight_bytes == pytest.approx(4 * read, rel=1e-3)
    decoder = decoder_of(load_config(resolve_model(str(checkpoint))))
    cached = 2 * 4 * decoder.blocks * decoder.kv_heads * decoder.head_dim
    assert traffic("onnxruntime", "fp32").position_bytes == cached
    assert traffic("deepsparse", "fp32").position_bytes == cached


def test_blocks_with_a_window_read_no_more_of_the_cache_than_that() -> None:
    everywhere, some = Traffic(0, 0, 8, 4), Traffic(0, 0, 8, 4, windows=(None, 100, 100, None))
    assert everywhere.attended(900) == 900
    assert some.attended(60) == 60
    assert some.attended(900) == (900 + 100 + 100 + 900) / 4


def test_skipped_weights_cost_one_bit_and_no_operation(traffic: Callable[..., Traffic]) -> None:
    dense, sparse = traffic("deepsparse", "fp32"), traffic("deepsparse", "fp32", 0.75)
    assert sparse.estimated
    assert not dense.estimated
    pruned = (dense.operations - sparse.operations) / 2
    assert dense.weight_bytes - sparse.weight_bytes == pytest.approx(4 * pruned - pruned / 0.75 / 8)
    # Where the bits would cost more than the zeros, nothing is saved.
    assert traffic("deepsparse", "int8", 0.1).weight_bytes == traffic("deepsparse", "int8").weight_bytes


def test_a_pruned_head_is_skipped_like_a_pruned_block(traffic: Callable[..., Traffic]) -> None:
    dense, sparse = traffic("deepsparse", "fp32"), traffic("deepsparse", "fp32", 0.0, 0.75)
    assert sparse.estimated
    head = 512 * 64
    assert dense.operations - sparse.operations == pytest.approx(2 * 0.75 * head)
    assert dense.weight_bytes - sparse.weight_bytes == pytest.approx(4 * 0.75 * head - head / 8)


def test_peak_rates_are_those_of_a_processor() -> None:
    peak = measure_peak(choose_cores(1))
    # Between a machine that is all but stopped and one that there is none of.
    assert 1e6 < peak.fp32 < 1e15
    assert 1e6 < peak.int8 < 1e15
