"""Threads of the real engines work on the cores asked for, one on each, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dlp_deploy.bench.cores import choose_cores
from dlp_deploy.bench.engines import engine_named
from dlp_deploy.bench.environments import install
from dlp_deploy.bench.worker import EngineWorker
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.plan import Graph
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model

from .tiny_models import SIZES, save_tiny_model

CORES = choose_cores(None)
# Large enough that engines share a product among threads.
WIDE = SIZES | {"hidden_size": 512, "intermediate_size": 1024}
# What a thread does beside the busiest one to wake up and sleep again is no work.
IDLE_SHARE = 0.1
# Where other work keeps one of the cores busy, its thread may find the others to have done its share.
ATTEMPTS = 20


@pytest.fixture(scope="module")
def model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("wide")
    checkpoint = save_tiny_model(folder / "model", LlamaConfig(**WIDE), tiny_tokenizer)

    def write(engine: str) -> Path:
        if engine == "torch":
            return checkpoint
        files = resolve_model(str(checkpoint))
        config = load_config(files)
        decoder = decoder_of(config)
        weights = Weights(open_checkpoint(files), decoder)
        graph = Graph(engine, "fp32", False, engine)  # type: ignore[arg-type]
        return write_graph(folder / engine, graph, weights, decoder, config, lambda: None).model

    return write


def processor_ns(process: int) -> dict[str, tuple[int, list[int]]]:
    """Nanoseconds that each thread of a process has run, and where it may; of those that have not ended."""
    found = {}
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            spent = int((task / "schedstat").read_text().split()[0])
            found[task.name] = spent, sorted(os.sched_getaffinity(int(task.name)))
    return found


def places_of_work(worker: EngineWorker) -> list[list[int]]:
    """Where each thread that works may run, while the engine decodes."""
    before = processor_ns(worker.pid)
    for _ in range(2):
        worker.generate(np.arange(80), 16)
    after = processor_ns(worker.pid)
    worked = [(spent - before.get(name, (0, []))[0], place) for name, (spent, place) in after.items()]
    busiest = max(spent for spent, _ in worked)
    return sorted(place for spent, place in worked if spent > IDLE_SHARE * busiest)


@pytest.mark.parametrize("cores", sorted({CORES[:1], CORES[-1:], CORES[:2]}))
@pytest.mark.parametrize("engine", ["deepsparse", "llamacpp", "onnxruntime", "torch"])
def test_each_thread_that_works_has_a_core_of_its_own(
    engine: str, cores: tuple[int, ...], model: Callable[[str], Path]
) -> None:
    install(engine)
    with EngineWorker.spawn(engine_named(engine), cores) as worker:
        worker.load(model(engine), context=120, prompt=64)
        for _ in range(ATTEMPTS):
            places = places_of_work(worker)
            if len(places) == len(cores):
                break
    assert places == [[core] for core in sorted(cores)]
