"""From the arguments of serve to a loaded engine and a server over it."""

from __future__ import annotations

from pathlib import Path

from ..artifact import check_files, read_manifest
from ..bench.engines import engine_named
from ..bench.machine import choose_cores
from ..bench.worker import EngineWorker
from ..errors import UserError
from ..models import ModelFiles, load_config
from ..outline import outline_of
from ..progress import say
from .codec import open_codec
from .server import bound_socket, run, termination_as_interrupt

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
    graph = _graph(folder, engine, precision)
    files = ModelFiles(folder.resolve().name, str(folder), graph.parent)
    chosen, positions = choose_cores(cores), _positions(files, context)
    codec = open_codec(files)
    with (
        termination_as_interrupt(),
        bound_socket(host, port) as listener,
        EngineWorker.spawn(engine_named(engine), chosen) as worker,
    ):
        say(f"Loading {graph.parent} into {engine}: {len(chosen)} cores, context of {positions} tokens")
        step = min(PROMPT_STEP, positions - 1)
        worker.load(graph, positions, prompt=step)
        run(worker, listener, files.name, codec, positions, step)


def _graph(folder: Path, engine: str, precision: str | None) -> Path:
    """The sparse graph to serve; its folder's files are what the manifest says."""
    model_file = engine_named(engine).model_file
    manifest = read_manifest(folder)
    for export in manifest.exports:
        if export.engine == engine and not export.dense and precision in (None, export.precision):
            check_files(folder, manifest, (f"{export.path}/",))
            return folder / export.path / model_file
    has = ", ".join(f"{export.engine} {export.precision}" for export in manifest.exports if not export.dense)
    raise UserError(
        f"{folder} has no sparse graph for {engine} {precision or ''}".rstrip()
        + f"; it has: {has or 'none'}; add one with: dlp-deploy export"
    )


def _positions(files: ModelFiles, asked: int | None) -> int:
    most = outline_of(load_config(files)).max_positions
    if asked is not None and not 2 <= asked <= most:
        raise UserError(f"--context {asked}: this model takes 2 to {most} tokens")
    return asked or min(DEFAULT_CONTEXT, most)
