"""Measure an artifact in the engines it was exported for, against dense baselines, on equal terms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

REPORT = "report.json"


def bench(
    artifact: str | Path | None = None,
    engine: str = "deepsparse",
    cores: int | None = None,
    baseline: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    context: int | None = None,
    repeats: int = 5,
    eval_data: str = "builtin",
    eval_windows: int = 16,
    eval_tokens: int = 512,
    time_limit: float = 3600,
    output: str | Path | None = None,
    force: bool = False,
) -> Report:
    """Measure `artifact` (None: the newest below ./artifacts) and write a report.

    `engine` is a name, a comma-separated list, or "all" (what is installed); `baseline` a list of dense
    models by precision (int8: in ONNX Runtime; llamacpp-int8: in llama.cpp), "none", or None for all that
    the artifact holds and an installed engine runs. `cores` are physical ones, one thread on each (None: all,
    but the slow ones of a hybrid processor). The KV cache has room for `context` positions (None:
    512, or as many as the model has); what prompt and new tokens leave of it is filled before the clock
    starts (a multiple of 16 tokens), so that decoding is timed at that depth. Perplexity is taken on
    `eval_windows` windows of `eval_tokens` tokens of `eval_data` (0 windows: not at all). An engine that
    gives no answer for `time_limit` seconds has failed.

    `output` is a .json file; .md, .csv, .png and .svg are written beside it, and `force` replaces what is
    there. It defaults to <artifact>.bench/report.json. Raises UserError for what cannot be measured as asked,
    before any measurement begins. What stops it later, Ctrl-C too, is raised when the report of the rounds
    that were finished is written.
    """
    # Imported here: naming an engine must not cost the import of torch.
    from .run import Request, run_bench

    request = Request(
        artifact=Path(artifact) if artifact else None,
        engine=engine,
        cores=cores,
        baseline=baseline,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        context=context,
        repeats=repeats,
        eval_data=eval_data,
        eval_windows=eval_windows,
        eval_tokens=eval_tokens,
        time_limit=time_limit,
        output=Path(output) if output else None,
        force=force,
    )
    return run_bench(request)
