"""The commands of `dlp-deploy bench`: measure an artifact, sweep over sparsities, compare, project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..options import Cores

MEASURE = "run"


class _BenchGroup(TyperGroup):
    """What is no sub-command is an argument of `bench run`, so that `bench ARTIFACT` measures."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [MEASURE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BenchGroup,
    rich_markup_mode="rich",
    help="Measure decode latency against dense baselines; see also: bench sweep, compare, project.",
)

PromptTokens = Annotated[int, typer.Option(help="Tokens of the timed prompt.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to decode, greedily, each one timed.")]
Context = Annotated[
    int | None,
    typer.Option(
        help="KV cache positions, filled to this depth. Default: 512, or as many as the model has; an "
        "emptier cache flatters sparse weights."
    ),
]
Repeats = Annotated[int, typer.Option(help="Rounds; in each, all runs take their turn.")]
TimeLimit = Annotated[float, typer.Option(help="Seconds after which a silent engine is ended.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


@app.command(MEASURE, epilog="Further: bench sweep, bench compare, bench project; each has --help.")
def run(
    artifact: Annotated[
        Path | None, typer.Argument(help="Artifact folder. Default: the newest below ./artifacts.")
    ] = None,
    engine: Annotated[str, typer.Option(help="deepsparse, onnxruntime, llamacpp, torch, a list, or all.")] = (
        "deepsparse"
    ),
    cores: Cores = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Dense models to compare with, e.g. int8,llamacpp-int8, or none. Default: all."),
    ] = None,
    prompt_tokens: PromptTokens = 128,
    new_tokens: NewTokens = 64,
    context: Context = None,
    repeats: Repeats = 5,
    eval_data: Annotated[str, typer.Option(help="Text for the perplexity, as --calib of prune.")] = "builtin",
    eval_windows: Annotated[int, typer.Option(help="Windows for the perplexity; 0 leaves it out.")] = 16,
    eval_tokens: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    time_limit: TimeLimit = 3600,
    output: Annotated[
        Path | None, typer.Option(help="A .json file. Default: <artifact>.bench/report.json.")
    ] = None,
    force: Force = False,
) -> None:
    """Measure decode latency against dense baselines, on equal terms, and write a report.

    [bold]dlp-deploy bench --engine deepsparse --cores 24[/bold]

    Every engine runs in a process of its own on the same physical cores. Its logits are checked before
    anything is timed; the runs take turns, so that a noisy machine disturbs all of them alike. The report
    is written as JSON, Markdown, CSV and a plot.
    """
    options = locals().copy()
    from . import bench
    from .present import print_report

    print_report(bench(**options))


@app.command()
def sweep(
    shape: Annotated[
        str, typer.Option(help="llama2-7b, llama2-13b, tinyllama-1.1b, ..., or a folder with config.json.")
    ],
    sparsity: Annotated[str, typer.Option(help="Sparsities to measure.")] = "0,0.5,0.6,0.7,0.8,0.9",
    quant: Annotated[
        str, typer.Option(help="Precisions to measure each in: fp32, int8, int4.")
    ] = "fp32,int8",
    engine: Annotated[
        str, typer.Option(help="Of the sparse model: deepsparse, onnxruntime or llamacpp.")
    ] = "deepsparse",
    baseline: Annotated[
        str, typer.Option(help="Dense models beside each point, e.g. fp32,llamacpp-int4, or none.")
    ] = "fp32,int8,int4",
    blocks: Annotated[
        int | None,
        typer.Option(
            help="Measure this many decoder blocks and half as many, and extrapolate. Default: whole models, "
            "but those that memory does not hold."
        ),
    ] = None,
    block_size: Annotated[
        int, typer.Option(help="Weights that share a scale in ONNX Runtime's int8 and int4; more are faster.")
    ] = 128,
    cores: Cores = None,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 32,
    context: Context = None,
    repeats: Repeats = 5,
    seed: Annotated[int, typer.Option(help="Seed of the random weights and tokens.")] = 0,
    time_limit: TimeLimit = 3600,
    output: Annotated[Path | None, typer.Option(help="JSONL file. Default: sweep-<shape>.jsonl.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure all again.")] = False,
) -> None:
    """Speed-up by sparsity of a real shape with random weights: the paper's figure, without its models.

    [bold]dlp-deploy bench sweep --shape tinyllama-1.1b[/bold]

    Each finished point is one line of the output; the same command goes on where it was stopped.
    """
    options = locals().copy()
    from .sweep import sweep
    from .sweep_report import to_markdown

    print(to_markdown(sweep(**options)))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A report.json.")],
    after: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Say what changed between two reports, and whether it is more than noise.

    [bold]dlp-deploy bench compare before.json after.json[/bold]

    Speed-ups, times and first tokens get a 95% interval over rounds and a verdict: within noise, higher or
    lower (of a time, lower is faster). Believe speed-ups first: both sides were measured within the same
    minutes, while times of two days also differ by heat and by other work. What differs between the machines
    and the arguments comes last; another model or artifact, and different work, are named at the top.
    """
    from .compare import compare, to_markdown

    print(to_markdown(compare(before, after)))


@app.command()
def project(
    reports: Annotated[
        list[Path],
        typer.Argument(
            help="report.json, or a sweep's .jsonl; of several at different --cores a serial part is fitted."
        ),
    ],
    machine: Annotated[str | None, typer.Option(help="A known machine: xeon-6248r.")] = None,
    cores: Annotated[int | None, typer.Option(help="Cores of the machine.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that its cores together can read, not the published peak.")
    ] = None,
    clock: Annotated[
        float | None, typer.Option(help="Its clock in GHz. Default: that of the measurement.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Project to the cores of this report, and compare with it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Default: <report>.<machine>.json.")] = None,
) -> None:
    """Expected time per token on a described machine, from measured rates; marked as projected.

    [bold]dlp-deploy bench project report.json --machine xeon-6248r[/bold]

    [bold]dlp-deploy bench project one-core.json two-cores.json --cores 16 --bandwidth 60[/bold]

    Time = the larger of compute / cores and bytes / bandwidth, and a serial part, which takes reports at two
    or more --cores to be seen: from one alone the projection is optimistic. How far to trust it is measured
    with --check, a report of the same machine at more cores. All assumptions are printed above the figures.
    """
    options = locals().copy()
    from .project import project, to_markdown

    print(to_markdown(project(**options)))
