"""The real engines, on one small model: each says what torch says, through its KV cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM

from dlp_deploy.bench.engines import engine_named, engines
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.worker import EngineWorker, WorkerError
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.errors import UserError
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.plan import Graph
from dlp_deploy.export.verify import graph_logits
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model

from .servers import wait_until

CONTEXT, PROMPT = 127, 64
ENGINES = ("deepsparse", "llamacpp", "onnxruntime", "torch")
IDS = np.random.default_rng(0).integers(0, 500, CONTEXT)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def expected(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("graphs")

    def export(engine: str, precision: str) -> Path:
        if engine == "torch":
            return checkpoint
        files = resolve_model(str(checkpoint))
        config = load_config(files)
        decoder = decoder_of(config)
        weights = Weights(open_checkpoint(files), decoder)
        graph = Graph(engine, precision, False, engine)  # type: ignore[arg-type]
        return write_graph(
            folder / f"{engine}-{precision}", graph, weights, decoder, config, lambda: None
        ).model

    return export


@pytest.fixture(scope="module", params=ENGINES)
def worker(request: pytest.FixtureRequest, exported: Callable[[str, str], Path]) -> Iterator[EngineWorker]:
    install(request.param)
    with EngineWorker.spawn(engine_named(request.param), [min(os.sched_getaffinity(0))]) as started:
        started.load(exported(request.param, "fp32"), CONTEXT, PROMPT)
        yield started


def error(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


# Shorter than any prompt step, with a remainder, exactly the prompt, and more than one step.
@pytest.mark.parametrize("prompt", [1, 7, 64, 100])
def test_logits_to_the_end_of_the_context(worker: EngineWorker, expected: np.ndarray, prompt: int) -> None:
    logits = worker.logits(IDS, prompt)
    assert logits.shape == expected[prompt - 1 :].shape
    assert error(logits, expected[prompt - 1 :]) < 1e-5


def test_greedy_tokens_are_those_of_torch(worker: EngineWorker, model: torch.nn.Module) -> None:
    prompt = torch.from_numpy(IDS[:90])[None]
    with torch.inference_mode():
        tokens = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1)[0, 90:]  # type: ignore[operator]
    # 26 tokens fill the cache, and then 64 are the prompt.
    assert worker.generate(IDS[:90], 20).tokens == tuple(tokens.tolist())


def test_likelihood_of_whole_windows(worker: EngineWorker, model: torch.nn.Module) -> None:
    windows = np.random.default_rng(1).integers(0, 500, (2, 150))
    with torch.inference_mode():
        logits = model(torch.from_numpy(windows)).logits
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), torch.from_numpy(windows[:, 1:]), reduction="none"
    )
    np.testing.assert_allclose(worker.window_nll(windows), nll.numpy(), rtol=1e-4, atol=1e-4)


def test_an_idle_worker_uses_no_processor(worker: EngineWorker) -> None:
    """Several are loaded while one is measured."""
    worker.generate(IDS[:64], 20)

    def rests() -> bool:
        before = worker.memory().cpu_s
        time.sleep(0.5)
        return worker.memory().cpu_s - before < 0.1

    # Threads may look out for more work for a while.
    wait_until(rests)


def test_more_than_the_context_is_refused(worker: EngineWorker) -> None:
    with pytest.raises(WorkerError, match="do not fit"):
        worker.logits(np.zeros(300, dtype=np.int64), 64)


def test_int8_in_deepsparse_is_as_close_to_torch_as_in_onnxruntime(
    exported: Callable[[str, str], Path], expected: np.ndarray
) -> None:
    graph = exported("deepsparse", "int8")
    reference = graph_logits(graph, IDS, PROMPT)
    install("deepsparse")
    with EngineWorker.spawn(engine_named("deepsparse"), [min(os.sched_getaffinity(0))]) as worker:
        worker.load(graph, CONTEXT, PROMPT)
        logits = worker.logits(IDS, PROMPT)
    quantization = np.abs(reference - expected[PROMPT - 1 :]).mean()
    assert np.abs(logits - expected[PROMPT - 1 :]).mean() < 1.5 * quantization


def test_what_deepsparse_aborts_on_is_an_error(tmp_path: Path) -> None:
    """DynamicQuantizeLinear ends the process of its compiler."""
    weight = helper.make_tensor("weight", TensorProto.INT8, [512, 8], bytes(512 * 8), raw=True)
    table = helper.make_tensor(
        "table", TensorProto.FLOAT, [9, 512], np.ones((9, 512), np.float32).tobytes(), raw=True
    )
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["quantized", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["quantized", "weight", "zero"], ["product"]),
        helper.make_node("Cast", ["product"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", 8])]
    graph = helper.make_graph(nodes, "aborts", inputs, outputs, [weight, table])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=7), tmp_path / "model.onnx")
    install("deepsparse")
    with (
        EngineWorker.spawn(engine_named("deepsparse"), [min(os.sched_getaffinity(0))]) as worker,
        pytest.raises(WorkerError, match=r"deepsparse \(load\) .*last words: Assertion"),
    ):
        worker.load(tmp_path / "model.onnx", CONTEXT, PROMPT)


COUNTED = """
import json, os
from pathlib import Path
from engine_workers import deepsparse

class Session(deepsparse.Session):
    def restart(self):
        super().restart()
        self.calls = []
        for engine in self._cache.engines:
            engine.run = self.counted(engine)

    def counted(self, engine):
        def run(*arguments):
            self.calls.append(engine.tokens)
            Path(os.environ["CALLS_FILE"]).write_text(json.dumps(self.calls))
            return type(engine).run(engine, *arguments)
        return run
"""


@pytest.mark.parametrize(
    ("fill", "prompt", "calls"),
    [
        (0, 64, [64]),
        # A prompt step of 64 would begin within a block of the cache, where the engine computes wrongly.
        (32, 64, [32, 32, 32]),
        (16, 64, [16] * 5),
        (64, 40, [32, 32, 32, *[1] * 8]),
        (16, 17, [16, 16, 1]),
        (0, 7, [1] * 7),
    ],
)
def test_deepsparse_reads_a_prompt_in_its_largest_fitting_step(
    fill: int,
    prompt: int,
    calls: list[int],
    exported: Callable[[str, str], Path],
    expected: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install("deepsparse")
    (tmp_path / "counted.py").write_text(COUNTED)
    monkeypatch.setenv("CALLS_FILE", str(tmp_path / "calls.json"))
    engine = replace(engine_named("deepsparse"), worker=str(tmp_path / "counted.py"))
    with EngineWorker.spawn(engine, [min(os.sched_getaffinity(0))]) as worker:
        worker.load(exported("deepsparse", "fp32"), CONTEXT, prompt, fill)
        end = fill + prompt
        logits = worker.follow(IDS[:end], IDS[end : end + 2])
    assert json.loads((tmp_path / "calls.json").read_text()) == [*calls, 1, 1]
    assert error(logits, expected[end - 1 : end + 2]) < 1e-5


def test_an_unknown_engine_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"did you mean deepsparse\? .*onnxruntime, .*torch"):
        engine_named("deep-sparse")


def test_every_engine_names_its_licence_and_has_its_lock() -> None:
    for engine in engines().values():
        assert engine.licence
        assert engine.lock is None or engine.lock.is_file()
