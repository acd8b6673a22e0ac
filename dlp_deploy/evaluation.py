"""Perplexity of a model or an artifact, in the engine that will serve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .artifact import CHECKPOINT, MANIFEST, Export, check_files, graph_of, read_manifest
from .bench.cores import choose_cores
from .bench.engines import Engine, engine_named
from .bench.environments import interpreter
from .bench.worker import EngineWorker
from .blocks import logits_of
from .calibration import TokenWindows, evaluation_windows
from .errors import UserError
from .models import ModelFiles, load_config, load_tokenizer, resolve_model
from .outline import outline_of
from .perplexity import Perplexity, perplexity_of
from .progress import progress

# Windows that are in flight at once in torch: their hidden states are on disk, so few suffice.
TORCH_WINDOWS = 16


@dataclass(frozen=True)
class Evaluation:
    """A perplexity and all that is needed to repeat it. `sha256` is over the token ids."""

    model: str
    engine: str
    precision: str
    data: str
    tokens_per_window: int
    sha256: str
    perplexity: float
    stderr: float
    tokens: int
    windows: int


def evaluate(
    model: str,
    engine: str = "torch",
    data: str = "wikitext2",
    precision: str | None = None,
    dense: bool = False,
    windows: int | None = None,
    seqlen: int | None = None,
    cores: int | None = None,
) -> Evaluation:
    """Perplexity of `model` on `data`, in consecutive windows without overlap.

    `model` is an artifact folder, or with engine "torch" anything that prune takes. `engine` is torch
    (the checkpoint, fp32, block by block), onnxruntime, deepsparse or llamacpp (the artifact's graphs).
    `precision` chooses among an artifact's graphs, `dense` its baseline. `seqlen` defaults to the model's
    positions, at most 2048; `cores` is the number of physical cores (all that this process may use, but slow
    ones of a hybrid processor). Raises UserError for an engine, a graph or cores that are not there and for
    what torch has no use for, before anything is downloaded; when files of the artifact are missing or
    altered; and when the text is out of reach, or shorter than a window.
    """
    described = engine_named(engine)
    if engine == "torch" and (dense or precision not in (None, "fp32")):
        raise UserError(
            "torch runs the checkpoint in fp32: --dense and --precision choose among graphs; name an engine "
            "with --engine, or the dense model itself"
        )
    chosen_cores = choose_cores(cores)
    folder = Path(model)
    graph = None if engine == "torch" else _graph(folder, described, precision, dense)
    files = _files(model, folder, engine)
    positions = outline_of(load_config(files)).max_positions
    length = min(2048, positions) if seqlen is None else seqlen
    if length > positions:
        raise UserError(f"--seqlen {length} is longer than the {positions} positions of {model}")
    text = evaluation_windows(data, load_tokenizer(files), windows, length)
    if graph is None:
        with _threads(len(chosen_cores)):
            result, chosen = perplexity_of(torch_nll(files, text)), "fp32"
    else:
        path, chosen = folder / graph.path / described.model_file, graph.precision
        result = perplexity_of(_engine_nll(described, path, text, chosen_cores))
    return _record(model, engine, chosen, data, text, result)


def _graph(folder: Path, engine: Engine, precision: str | None, dense: bool) -> Export:
    """The artifact's graph to run. Raises UserError as `graph_of` does, and when the engine is missing."""
    interpreter(engine)
    return graph_of(folder, engine.name, precision, dense)


def _files(model: str, folder: Path, engine: str) -> ModelFiles:
    """The checkpoint of a model or an artifact. Of an artifact's, what `engine` makes use of is unaltered: an
    engine with graphs of its own reads no weights there, but the tokenizer."""
    if not (folder / MANIFEST).is_file():
        return resolve_model(model)
    manifest = read_manifest(folder)
    read = [f"{CHECKPOINT}/"]
    if engine != "torch":
        listed = (stored.path for stored in manifest.files)
        read = [path for path in listed if path.startswith(read[0]) and not path.endswith(".safetensors")]
    check_files(folder, manifest, read)
    return ModelFiles(folder.name, model, folder / CHECKPOINT)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_nll(files: ModelFiles, text: TokenWindows) -> np.ndarray:
    """Negative log-likelihoods in nats, float32 [windows, length - 1], of the checkpoint in float32."""
    rows: list[np.ndarray] = []
    with progress("Perplexity in torch", len(text.ids)) as advance:
        for start in range(0, len(text.ids), TORCH_WINDOWS):
            batch = text.ids[start : start + TORCH_WINDOWS]
            for ids, logits in zip(batch, logits_of(files, batch), strict=True):
                nll = torch.nn.functional.cross_entropy(
                    logits[:-1], ids[1:].to(logits.device), reduction="none"
                )
                rows.append(nll.cpu().numpy())
                advance()
    return np.stack(rows)


def _engine_nll(engine: Engine, graph: Path, text: TokenWindows, cores: Sequence[int]) -> np.ndarray:
    with EngineWorker.spawn(engine, cores) as worker:
        worker.load(graph, context=text.ids.shape[1], prompt=0)
        return np.concatenate(list(_window_by_window(worker, engine.name, text)))


def _window_by_window(worker: EngineWorker, engine: str, text: TokenWindows) -> Iterator[np.ndarray]:
    with progress(f"Perplexity in {engine}", len(text.ids)) as advance:
        for window in text.ids.numpy():
            yield worker.window_nll(window[None])
            advance()


def _record(
    model: str, engine: str, precision: str, data: str, text: TokenWindows, result: Perplexity
) -> Evaluation:
    return Evaluation(
        model=model,
        engine=engine,
        precision=precision,
        data=data,
        tokens_per_window=text.ids.shape[1],
        sha256=text.sha256,
        perplexity=result.perplexity,
        stderr=result.stderr,
        tokens=result.tokens,
        windows=result.windows,
    )
