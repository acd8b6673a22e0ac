"""From the arguments of serve to a loaded engine and a server over it."""

from __future__ import annotations

from pathlib import Path

from ..artifact import graph_of
from ..bench.cores import choose_cores
from ..bench.engines import engine_named
from ..bench.worker import EngineWorker
from ..errors import UserError
from ..models import ModelFiles, load_config
from ..outline import outline_of
from ..progress import say
from ..termination import termination_as_interrupt
from .codec import open_codec
from .server import bound_socket, run

# Enough for a conversation, and little memory: 2 GB of KV cache in a 7B model.
DEFAULT_CONTEXT = 2048
# Tokens of a prompt that are read in one go; a client that left is noticed between two of them.
PROMPT_STEP = 64


def start(
    folder: Path,
    engine: str,
    precision: str | None,
    cores: int | None,
    context: int | None,
    host: str,
    port: int,
) -> None:
    """See dlp_deploy.serving.serve."""
    described = engine_named(engine)
    graph = folder / graph_of(folder, engine, precision).path / described.model_file
    files = ModelFiles(folder.resolve().name, str(folder), graph.parent)
    outline = outline_of(load_config(files))
    chosen, positions = choose_cores(cores), _positions(outline.max_positions, context)
    codec = open_codec(files, outline.vocabulary)
    try:
        with (
            termination_as_interrupt(),
            bound_socket(host, port) as listener,
            EngineWorker.spawn(described, chosen) as worker,
        ):
            say(f"Loading {graph.parent} into {engine}: {len(chosen)} cores, context of {positions} tokens")
            step = min(PROMPT_STEP, positions - 1)
            worker.load(graph, positions, prompt=step)
            run(worker, listener, host, files.name, codec, positions, step)
    except KeyboardInterrupt:
        say("Stopped")


def _positions(most: int, asked: int | None) -> int:
    if asked is not None and not 2 <= asked <= most:
        raise UserError(f"--context {asked}: this model takes 2 to {most} tokens")
    return asked or min(DEFAULT_CONTEXT, most)
