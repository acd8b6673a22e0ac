"""An OpenAI-compatible server over one engine worker.

sampling (logits -> token), text (tokens -> text) and logprobs are pure; codec is the tokenizer; decoding
runs the engine, one sequence at a time; protocol is the shape of requests and replies, failures that of
errors; app puts them on HTTP, server gives it a process, start loads the engine for it.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def serve(
    artifact: Path | str,
    engine: str = "onnxruntime",
    precision: str | None = None,
    cores: int | None = None,
    context: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Serve a sparse model of `artifact` until interrupted (SIGINT or SIGTERM).

    `precision` chooses among several graphs of one engine; the artifact's own unless told. `cores` is
    the number of physical cores (all that this process may use, but slow ones of a hybrid processor),
    `context` the most tokens of prompt and reply together (2048, or fewer where the model has fewer), `port`
    0 takes a free one.

    Raises UserError when the artifact, engine, cores, context or address cannot be used, and
    WorkerError when the engine died, which ends the server once those who wait have been told.
    """
    # Imported here: the libraries of the server are an extra, and take seconds.
    try:
        from .start import start
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; run: pip install 'dlp-deploy[serve]'") from None
    start(Path(artifact), engine, precision, cores, context, host, port)
