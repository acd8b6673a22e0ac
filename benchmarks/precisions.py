"""Every precision in every engine: perplexity in that engine, logit error, size, export time and memory.

    python benchmarks/precisions.py ARTIFACT [--data builtin] [--windows 16] [--seqlen 512]

ARTIFACT is what prune wrote; graphs in it are replaced. About 20 minutes on 2 cores for SmolLM2-135M.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
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

    @property
    def title(self) -> str:
        parts = [self.precision]
        if self.precision != "fp32":
            parts += [self.rounding] + ([f"block {self.block_size}"] if self.engine == "onnxruntime" else [])
        if self.activations != "dynamic":
            parts.append(f"{self.activations} activations")
        return ", ".join(parts + ([f"fp32 kept: {self.keep_fp32}"] if self.keep_fp32 != "none" else []))


VARIANTS = (
    Variant("onnxruntime", "fp32"),
    Variant("onnxruntime", "int8"),
    Variant("onnxruntime", "int4", "nearest"),
    Variant("onnxruntime", "int4"),
    Variant("onnxruntime", "int4", "nearest", 128),
    Variant("onnxruntime", "int4", "gptq", 128),
    Variant("deepsparse", "fp32"),
    Variant("deepsparse", "int8", "nearest"),
    Variant("deepsparse", "int8"),
    Variant("deepsparse", "int8", "nearest", activations="static"),
    Variant("deepsparse", "int8", activations="static"),
    Variant("deepsparse", "int8", keep_fp32="auto", activations="static"),
    Variant("deepsparse", "int8", keep_fp32="auto"),
    Variant("deepsparse", "int4", "nearest"),
    Variant("deepsparse", "int4"),
)


def row(artifact: Path, variant: Variant, options: argparse.Namespace, pruned: float) -> str:
    command = [DLP_DEPLOY, "export", str(artifact), "--quant", variant.precision, "--baseline", "none"]
    command += ["--target", variant.engine, "--rounding", variant.rounding, "--force"]
    command += ["--block-size", str(variant.block_size), "--keep-fp32", variant.keep_fp32]
    command += ["--activations", variant.activations]
    try:
        seconds, peak = measured(command)
    except SystemExit:
        # What it said is on stderr: most likely that its logits are too far from torch's.
        return f"| {variant.engine} | {variant.title} | refused by the checks of export | | | | | |"
    made = read_manifest(artifact).export_for(variant.engine, variant.precision, dense=False)
    assert made is not None
    found = evaluate(
        str(artifact), variant.engine, options.data, windows=options.windows, seqlen=options.seqlen
    )
    checks = {check.engine: check for check in made.checks if check.reference == "torch"}
    check = checks.get(variant.engine, made.checks[0])
    increase = found.perplexity / pruned - 1
    return (
        f"| {variant.engine} | {variant.title} | {found.perplexity:.2f} ({increase:+.2%}) "
        f"| {check.max_rel_error:.1e} | {check.mean_rel_error:.1e} | {made.weight_bytes / 1e6:.0f} MB "
        f"| {seconds:.0f} s | {peak / 1e6:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    pruned = evaluate(
        str(options.artifact), data=options.data, windows=options.windows, seqlen=options.seqlen
    )
    rows = [
        "| engine | weights | perplexity | max logit error | mean | weights | export | peak memory |",
        "|---|---|---|---|---|---|---|---|",
        f"| torch | fp32 | {pruned.perplexity:.2f} ± {pruned.stderr:.2f} | | | | | |",
    ]
    for variant in VARIANTS:
        rows.append(row(options.artifact, variant, options, pruned.perplexity))
        say(rows[-1])
    print("\n".join(rows))


if __name__ == "__main__":
    main()
