"""Every precision in every engine: perplexity in that engine, logit error, size, export time and memory.

    python benchmarks/precisions.py ARTIFACT [--data builtin] [--windows 16] [--seqlen 512]

ARTIFACT is what prune wrote; graphs in it are replaced. An hour on 2 cores for SmolLM2-135M; results
are appended to a file, and those that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import DLP_DEPLOY, measured

from dlp_deploy.artifact import read_manifest
from dlp_deploy.evaluation import evaluate
from dlp_deploy.progress import say


@dataclass(frozen=True)
class Variant:
    engine: str
    precision: str
    rounding: str = "gptq"
    block_size: int = 32
    keep_fp32: str = "none"
    activations: str = "dynamic"
    smooth: bool = True

    @property
    def in_blocks(self) -> bool:
        return self.engine == "onnxruntime" and self.precision != "fp32"

    @property
    def title(self) -> str:
        parts = [self.precision]
        if self.precision != "fp32":
            parts += [self.rounding] + ([f"block {self.block_size}"] if self.in_blocks else [])
        if self.activations != "dynamic":
            parts.append(f"{self.activations} activations")
        if not self.smooth:
            parts.append("not smoothed")
        return ", ".join(parts + ([f"fp32 kept: {self.keep_fp32}"] if self.keep_fp32 != "none" else []))


# What the others are compared with.
PRUNED = Variant("torch", "fp32")
VARIANTS = (
    PRUNED,
    Variant("onnxruntime", "fp32"),
    Variant("deepsparse", "fp32"),
    Variant("onnxruntime", "int8", "nearest"),
    Variant("deepsparse", "int8"),
    Variant("deepsparse", "int8", activations="static"),
    Variant("onnxruntime", "int4", "nearest", 128),
    Variant("onnxruntime", "int4", "gptq", 128),
    Variant("onnxruntime", "int4", "nearest"),
    Variant("onnxruntime", "int4"),
    Variant("deepsparse", "int8", "nearest"),
    Variant("deepsparse", "int8", "nearest", smooth=False),
    Variant("deepsparse", "int8", "nearest", activations="static"),
    Variant("deepsparse", "int4", "nearest"),
    Variant("deepsparse", "int4"),
    Variant("deepsparse", "int8", keep_fp32="auto"),
    Variant("deepsparse", "int8", keep_fp32="auto", activations="static"),
)


@dataclass(frozen=True)
class Result:
    """`perplexity` 0: the checks of export refused the graph."""

    engine: str
    title: str
    perplexity: float = 0.0
    stderr: float = 0.0
    max_logit_error: float = 0.0
    mean_logit_error: float = 0.0
    weight_bytes: int = 0
    export_seconds: float = 0.0
    peak_rss_bytes: int = 0


def run(artifact: Path, variant: Variant, options: argparse.Namespace) -> Result:
    command = [DLP_DEPLOY, "export", str(artifact), "--quant", variant.precision, "--baseline", "none"]
    command += ["--target", variant.engine, "--rounding", variant.rounding, "--force"]
    command += ["--activations", variant.activations, "--keep-fp32", variant.keep_fp32]
    if not variant.smooth:
        command.append("--no-smooth")
    if variant.in_blocks:
        command += ["--block-size", str(variant.block_size)]
    seconds, peak = 0.0, 0
    try:
        if variant != PRUNED:
            seconds, peak = measured(command)
    except SystemExit:
        # What it said is on stderr: most likely that its logits are too far from torch's.
        return Result(variant.engine, variant.title)
    text = {"windows": options.windows, "seqlen": options.seqlen}
    found = evaluate(str(artifact), variant.engine, options.data, variant.precision, **text)
    perplexity = (variant.engine, variant.title, found.perplexity, found.stderr)
    if variant == PRUNED:
        return Result(*perplexity)
    made = read_manifest(artifact).export_for(variant.engine, variant.precision, dense=False)
    assert made is not None
    checks = {check.engine: check for check in made.checks if check.reference == "torch"}
    check = checks.get(variant.engine, made.checks[0])
    return Result(*perplexity, check.max_rel_error, check.mean_rel_error, made.weight_bytes, seconds, peak)


def table(results: Sequence[Result]) -> str:
    lines = [
        "| engine | weights | perplexity | max logit error | mean | weights | export | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pruned = results[0].perplexity
    for result in results:
        cells = [f"{result.perplexity:.2f} ± {result.stderr:.2f}"]
        if result.engine != PRUNED.engine:
            cells = [
                f"{result.perplexity:.2f} ({result.perplexity / pruned - 1:+.2%})",
                f"{result.max_logit_error:.1e}",
                f"{result.mean_logit_error:.1e}",
                f"{result.weight_bytes / 1e6:.0f} MB",
                f"{result.export_seconds:.0f} s",
                f"{result.peak_rss_bytes / 1e6:.0f} MB",
            ]
        if not result.perplexity:
            cells = ["refused by the checks of export"]
        cells += [""] * (6 - len(cells))
        lines.append(f"| {' | '.join([result.engine, result.title, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("precisions.jsonl"))
    options = parser.parse_args()
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    done = {(result.engine, result.title) for result in results}
    for variant in VARIANTS:
        if (variant.engine, variant.title) in done:
            continue
        results.append(run(options.artifact, variant, options))
        with options.output.open("a") as stream:
            stream.write(json.dumps(asdict(results[-1])) + "\n")
        say(table([results[0], results[-1]]).splitlines()[-1])
    print(table(results))


if __name__ == "__main__":
    main()
