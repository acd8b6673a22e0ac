"""The command line: each command is one plain function of the package, with the same arguments.

Imports happen inside the commands, so that --help and input errors answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .bench.cli import app as bench_app
from .errors import UserError
from .finetuning.command import finetune
from .options import (
    Activations,
    Allocation,
    Alpha,
    Baseline,
    BlockSize,
    Calib,
    Cores,
    Device,
    Force,
    HeadSparsity,
    KeepFp32,
    Length,
    Method,
    Model,
    Output,
    Pattern,
    Quant,
    QuantizationText,
    RecipeOption,
    Resume,
    Rounding,
    Samples,
    Seed,
    Smooth,
    Sparsity,
    Statistic,
    Targets,
)
from .recipes.cli import app as recipe_app
from .termination import termination_as_interrupt

# As a shell says it: 128 and the number of SIGINT.
INTERRUPTED = 130
RESUMABLE = ("prune", "prune-export", "finetune")

app = typer.Typer(
    name="dlp-deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune a language model layer by layer, export it to sparse ONNX, "
    "and measure what that buys on a CPU.",
    epilog="Start here: [bold]dlp-deploy doctor[/bold] says what this machine can do; "
    "[bold]dlp-deploy prune-export --help[/bold] explains the main job.",
)
engine_app = typer.Typer(no_args_is_help=True, help="Engines that live in environments of their own.")
app.add_typer(bench_app, name="bench")
app.add_typer(recipe_app, name="recipe")
app.add_typer(engine_app, name="engine")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"dlp-deploy {version('dlp-deploy')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release.")
    ] = False,
) -> None:
    pass


@app.command("prune-export")
def prune_export_command(
    model: Model,
    sparsity: Sparsity = 0.7,
    quant: Quant = "int8",
    method: Method = "sparsegpt",
    allocation: Allocation = "dlp",
    alpha: Alpha = None,
    statistic: Statistic = None,
    pattern: Pattern = "unstructured",
    head_sparsity: HeadSparsity = None,
    calib: Calib = "c4",
    nsamples: Samples = 128,
    seqlen: Length = 2048,
    target: Targets = "deepsparse,onnxruntime",
    baseline: Baseline = "fp32,int8,int4",
    rounding: Rounding = "gptq",
    block_size: BlockSize = None,
    keep_fp32: KeepFp32 = "none",
    activations: Activations = "dynamic",
    smooth: Smooth = True,
    output: Output = None,
    seed: Seed = 0,
    device: Device = "auto",
    recipe: RecipeOption = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Prune a model, export it for the CPU engines, and verify it: from a checkpoint to an artifact.

    [bold]dlp-deploy prune-export --model llama2-7b --sparsity 0.7 --quant int8[/bold]

    The artifact folder holds the pruned checkpoint, masks, a SparseML recipe, the ONNX graphs and a
    manifest. Without a network: --calib builtin and --model with a folder.
    """
    options = locals().copy()
    from . import prune_export

    print(prune_export(**options))


@app.command()
def prune(
    model: Model,
    sparsity: Sparsity = 0.7,
    method: Method = "sparsegpt",
    allocation: Allocation = "dlp",
    alpha: Alpha = None,
    statistic: Statistic = None,
    pattern: Pattern = "unstructured",
    head_sparsity: HeadSparsity = None,
    calib: Calib = "c4",
    nsamples: Samples = 128,
    seqlen: Length = 2048,
    output: Output = None,
    seed: Seed = 0,
    device: Device = "auto",
    recipe: RecipeOption = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """The first half of prune-export: pruned checkpoint, masks, recipe and manifest, no graphs.

    One decoder block is in memory at a time, so a 7B model prunes on a machine with 16 GB. A killed run
    goes on with --resume.
    """
    options = locals().copy()
    from . import prune

    print(prune(**options))


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="Folder that prune wrote.")],
    quant: Quant = "int8",
    target: Targets = "deepsparse,onnxruntime",
    baseline: Baseline = "fp32,int8,int4",
    rounding: Rounding = "gptq",
    block_size: BlockSize = None,
    keep_fp32: KeepFp32 = "none",
    activations: Activations = "dynamic",
    smooth: Smooth = True,
    calib: QuantizationText = None,
    force: Force = False,
) -> None:
    """The second half of prune-export: add verified ONNX graphs to an artifact.

    Weights are streamed for the families that are described here. Other decoders (GPT-NeoX, GPT-2, Falcon,
    StableLM, ...) go to ONNX Runtime alone, through optimum's exporter, which holds the whole model in memory
    in fp32, more than four times over.

    An interrupted export goes on with the same command, behind the last graph that was finished and the last
    block that was rounded on text.
    """
    options = locals().copy()
    from . import export

    print(export(**options))


app.command()(finetune)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact folder, or with torch any model.")],
    engine: Annotated[str, typer.Option(help="torch, onnxruntime, deepsparse or llamacpp.")] = "torch",
    data: Annotated[
        str, typer.Option(help="wikitext2, ptb, c4, builtin (offline), or a file.")
    ] = "wikitext2",
    precision: Annotated[str | None, typer.Option(help="Which of the artifact's graphs.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The artifact's dense baseline.")] = False,
    windows: Annotated[int | None, typer.Option(help="How many windows. Default: the whole text.")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. Default: the model's, at most 2048.")
    ] = None,
    cores: Cores = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a model or an artifact, in the engine that will serve it, with its standard error."""
    options = locals().copy()
    as_json = options.pop("as_json")
    from . import evaluate

    result = evaluate(**options)
    if as_json:
        print(json.dumps({name: _as_json(value) for name, value in dataclasses.asdict(result).items()}))
    else:
        print(
            f"{result.engine} {result.precision}: perplexity {result.perplexity:.3f} +- {result.stderr:.3f} "
            f"on {result.data} ({result.tokens} tokens, {result.windows} windows)"
        )


def _as_json(value: object) -> object:
    """JSON has no nan, which is the standard error of one window, nor inf."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def serve(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    engine: Annotated[str, typer.Option(help="onnxruntime, deepsparse or llamacpp.")] = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help="Which graph. Default: the artifact's own.")] = None,
    cores: Cores = None,
    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of prompt and reply. Default: 2048, or as many as the model has."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve an artifact over HTTP as OpenAI's API does: completions and chat, whole or streamed, with several
    choices (n) and logprobs. What is not there (tools, penalties, echo, ...) is refused by name.

    Ctrl-C or SIGTERM ends it (status 0).
    When the engine dies, all who wait get an error, and the server ends (status 1, one line that says how).
    """
    options = locals().copy()
    from .serving import serve

    serve(**options)


@app.command()
def pack(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    output: Annotated[Path | None, typer.Option(help="File to write. Default: <artifact>.dlp.")] = None,
    force: Force = False,
) -> None:
    """Write an artifact into one small file: masks and nonzeros, as zeros in ONNX save nothing on disk."""
    from .export.pack import pack

    print(pack(artifact, output, force))


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="File that pack wrote.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: without .dlp.")] = None,
    force: Force = False,
) -> None:
    """Restore an artifact from the file that pack wrote, to the bit."""
    from .export.pack import unpack

    print(unpack(packed, output, force))


@app.command()
def doctor() -> None:
    """Say what this machine has and what is missing: Python, CPU, memory, disk, engines."""
    from .doctor import doctor, print_checks

    print_checks(doctor())


@engine_app.command("list")
def engine_list() -> None:
    """Say which engines there are, which are installed, and under which licence."""
    from .bench.environments import list_engines

    for status in list_engines():
        state = "installed" if status.python else f"missing; install it with: {status.advice}"
        print(f"{status.engine.name:14} {status.engine.title:24} {state}")
        print(f"{'':14} licence: {status.engine.licence}")


@engine_app.command("install")
def engine_install(name: Annotated[str, typer.Argument(help="The engine, e.g. deepsparse.")]) -> None:
    """Install an engine from its lock file into an environment of its own in the user's cache folder."""
    from .bench.environments import install

    print(install(name))


def main() -> None:
    """Run the command line; exit status 2 and one line on stderr when the input is wrong, 1 and one line when
    an engine fails or says something else than torch, and as a shell says it after a signal."""
    try:
        with termination_as_interrupt() as termination:
            status = app(standalone_mode=False) or 0
    except (UserError, OSError) as error:
        _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except Exception as error:
        if _is_told_in_one_line(error):
            _fail(" ".join(str(error).split()), 1)
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _fail(f"{message()}; see --help", 2)
    if status == INTERRUPTED:
        how = "interrupted"
        if termination.told_by is not None:
            how, status = f"ended by {termination.told_by.name}", 128 + termination.told_by
        _fail(f"{how}{_how_to_go_on(sys.argv[1:])}", status)
    sys.exit(status)


def _is_told_in_one_line(error: Exception) -> bool:
    # Imported here: only an error that ends the program is worth it.
    from .bench.worker import WorkerError
    from .export.verify import VerificationError

    return isinstance(error, (WorkerError, VerificationError))


def _how_to_go_on(arguments: Sequence[str]) -> str:
    """What to do after Ctrl-C, for the commands that keep what they had finished."""
    command, _, rest = " ".join(arguments).partition(" ")
    if command in RESUMABLE:
        return "; what is finished is kept, and --resume goes on from there"
    if command == "export" or (command == "bench" and rest.startswith("sweep")):
        return "; what is finished is kept: run the same command again, without --force, to go on"
    return ""


def _fail(message: str, status: int) -> NoReturn:
    print(f"dlp-deploy: {message}", file=sys.stderr)
    sys.exit(status)
