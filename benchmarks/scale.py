"""Prune and export a model of a real shape with random weights: time and memory against what is unavoidable.

    python benchmarks/scale.py [--shape llama2-7b] [--blocks N] [--method wanda] [--nsamples 4] [--seqlen 512]
        [--export int8] [--folder scale]

Writes a checkpoint with fp16 shards first (13 GB for llama2-7b; as much again for the pruned one), and
keeps it for the next run. `--blocks` leaves so many decoder blocks of the shape.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from processes import DLP_DEPLOY, measured
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlp_deploy.bench.random_model import RandomModel
from dlp_deploy.bench.shapes import shape_config
from dlp_deploy.blocks import Block, BlockModel
from dlp_deploy.checkpoint import open_checkpoint, shard_name, write_index, write_shard
from dlp_deploy.families import decoder_of
from dlp_deploy.hidden import HiddenStates
from dlp_deploy.models import resolve_model
from dlp_deploy.progress import progress, say

# Blocks that are timed for the floor; all have the same shape.
TIMED = 2


@dataclass(frozen=True)
class Floor:
    """Seconds for all blocks of what no implementation can leave out: `forward` is a bare forward pass,
    `statistics` one up to the input of the last linear layer."""

    forward: float
    statistics: float
    read: float
    write: float

    @property
    def seconds(self) -> float:
        """Dense activations for scores, pruned ones for masks, and what the pruned blocks make of them."""
        return 2 * self.forward + self.statistics + self.read + self.write


def write_checkpoint(config: Any, folder: Path) -> None:
    """Random fp16 weights, one shard per block, with a tokenizer whose tokens are bytes."""
    family, blocks = decoder_of(config).family, config.num_hidden_layers
    weights = RandomModel(config, 0.0, 0).checkpoint()
    prefixes = [f"{family.block(index)}." for index in range(blocks)]
    inside = [[name for name in weights.names() if name.startswith(prefix)] for prefix in prefixes]
    outside = [name for name in weights.names() if not name.startswith(family.blocks)]
    folder.mkdir(parents=True)
    with progress("Writing random weights", blocks + 1) as advance:
        for index, names in enumerate([outside, *inside]):
            tensors = {name: weights.tensor(name).half() for name in names}
            write_shard(folder / shard_name(index, blocks + 1), tensors)
            advance()
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_index(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def measured_floor(folder: Path, windows: int, length: int) -> Floor:
    files = resolve_model(str(folder))
    model = BlockModel(files, open_checkpoint(files))
    blocks = model.decoder.blocks
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    hidden = HiddenStates(scratch / "hidden", (windows, length, model.decoder.hidden))
    for some, states in model.embed(torch.randint(0, 256, (windows, length))):
        hidden.write(some, states)
    forward = statistics = read = write = 0.0
    for index in range(min(TIMED, blocks)):
        read += timed(lambda index=index: model.read_block(index))
        tensors = model.read_block(index)
        block = model.block(index, tensors, length)
        for some in hidden.batches():
            whole, partly = timed_forward(block, hidden.read(some))
            forward, statistics = forward + whole, statistics + partly
        write += timed(lambda tensors=tensors: write_shard(scratch / "shard.safetensors", tensors))
    shutil.rmtree(scratch)
    return Floor(*(total * blocks / min(TIMED, blocks) for total in (forward, statistics, read, write)))


def timed_forward(block: Block, states: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward pass, and of its part up to the input of the last linear layer."""
    reached: list[float] = []
    last = list(block.linears.values())[-1]
    hook = last.register_forward_pre_hook(lambda *_: reached.append(time.perf_counter()))
    start = time.perf_counter()
    block.run(states)
    end = time.perf_counter()
    hook.remove()
    return end - start, reached[0] - start


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--nsamples", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--export", help="precisions to export for DeepSparse and ONNX Runtime")
    parser.add_argument("--folder", type=Path, default=Path("scale"))
    options = parser.parse_args()
    config = shape_config(options.shape, options.blocks)
    dense = options.folder / f"{options.shape}-{config.num_hidden_layers}"
    pruned = options.folder / f"{dense.name}-{options.method}"
    if not dense.exists():
        write_checkpoint(config, dense)
    say(f"{dense.name}: {size(dense):.1f} GB")
    if not pruned.exists():
        floor = measured_floor(dense, options.nsamples, options.seqlen)
        say(
            f"Floor: 2 x {floor.forward:.0f} s forward, {floor.statistics:.0f} s to the last input, "
            f"{floor.read:.0f} s read, {floor.write:.0f} s written"
        )
        command = [DLP_DEPLOY, "prune", "--model", str(dense), "--sparsity", str(options.sparsity)]
        command += ["--method", options.method, "--calib", "builtin", "--output", str(pruned)]
        command += ["--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)]
        seconds, peak = measured(command)
        say(
            f"Pruned by {options.method} in {seconds:.0f} s, {seconds / floor.seconds:.2f} x the floor of "
            f"{floor.seconds:.0f} s; peak memory {peak / 2**30:.2f} GiB"
        )
    for precision in (options.export or "").split(","):
        for engine in ("deepsparse", "onnxruntime") if precision else ():
            command = [DLP_DEPLOY, "export", str(pruned), "--quant", precision, "--target", engine]
            seconds, peak = measured([*command, "--baseline", "none", "--rounding", "nearest", "--force"])
            say(
                f"Exported {engine} {precision} in {seconds:.0f} s; {size(pruned / engine):.1f} GB; "
                f"peak memory {peak / 2**30:.2f} GiB"
            )


if __name__ == "__main__":
    main()
