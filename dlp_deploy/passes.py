"""The two passes over a model: layer scores on the dense blocks, then block after block pruned.

Every block is a durable step. What enters block i is in one of two files and what leaves it goes into the
other, and the journal moves on only when shard, masks and hidden states are on disk. So a run that was
killed at any instant repeats the block it was in, from the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .activations import Inputs, Kind, measure_inputs
from .artifact import CHECKPOINT
from .blocks import Block, BlockModel
from .checkpoint import safetensors_entries, shard_name, tensor_sha256, write_shard
from .hidden import HiddenStates
from .journal import EMBEDDED, PRUNED, SCORED, SHARED, Journal
from .masking import Method, Pattern
from .progress import progress
from .recipes.masks import PackedMask, identity_of, pack_mask, sign_sample, write_masks, zero_pruned
from .scores import statistic_named, wanda_metric
from .threads import map_in_threads
from .unfinished import work_folder


@dataclass(frozen=True)
class Run:
    """What both passes work with: `ids` int64 [windows, length] or None, `folder` the growing artifact."""

    model: BlockModel
    method: Method
    pattern: Pattern
    ids: torch.Tensor | None
    folder: Path
    journal: Journal

    @property
    def work(self) -> Path:
        """What is needed only until the run is done."""
        return work_folder(self.folder)

    @property
    def blocks(self) -> int:
        return self.model.decoder.blocks

    @property
    def length(self) -> int:
        """Tokens of a window; any number will do when no activations are computed."""
        return 2 if self.ids is None else self.ids.shape[1]

    def shard(self, index: int) -> Path:
        """Shard 0 holds the embeddings, 1 to `blocks` one block each, and the last what comes after."""
        return self.folder / CHECKPOINT / shard_name(index, self.blocks + 2)

    def masks(self, block: int) -> Path:
        return self.work / f"masks-{block:05d}.safetensors"

    def entering(self, block: int) -> HiddenStates:
        """The hidden states that enter a block. The embeddings, which both passes start from, are kept."""
        return self._hidden(f"hidden-{block % 2}" if block else "hidden-embedded")

    def leaving(self, block: int) -> HiddenStates:
        return self._hidden(f"hidden-{(block + 1) % 2}")

    def _hidden(self, name: str) -> HiddenStates:
        assert self.ids is not None
        return HiddenStates(self.work / name, (*self.ids.shape, self.model.decoder.hidden))


def embed(run: Run) -> None:
    """Write what enters the first block, if any text is read at all."""
    if run.ids is None or run.journal.steps(EMBEDDED):
        return
    target = run.entering(0)
    for windows, states in run.model.embed(run.ids):
        target.write(windows, states)
    target.sync()
    run.journal.append(EMBEDDED)


def score_blocks(run: Run, statistic: str) -> list[float]:
    """First pass: the layer score of every block, on activations of the dense model."""
    done = len(run.journal.steps(SCORED))
    with progress("Scoring blocks", run.blocks) as advance:
        advance(done)
        for index in range(done, run.blocks):
            _score_block(run, index, statistic)
            advance()
    return [entry["score"] for entry in run.journal.steps(SCORED)]


def _score_block(run: Run, index: int, statistic: str) -> None:
    block = run.model.block(index, run.model.read_block(index), run.length)
    target = run.leaving(index) if index + 1 < run.blocks else None
    kind: Kind = "gram" if index == 0 and run.method.inputs == "gram" else "norms"
    inputs = measure_inputs(block, run.entering(index), kind, run.model.device, target)
    weights = {name: linear.weight for name, linear in block.linears.items()}
    score = statistic_named(statistic)(wanda_metric(weights, inputs.norms()))
    if index == 0:
        _save_shared_inputs(run, inputs)
    if target is not None:
        target.sync()
    run.journal.append(SCORED, block=index, score=score)


def _save_shared_inputs(run: Run, inputs: Inputs) -> None:
    """Keep what was measured in block 0, where both passes see the same activations."""
    write_shard(run.work / "inputs.safetensors", inputs.values)
    run.journal.append(SHARED, kind=inputs.kind, leaders=inputs.leaders)


def _shared_inputs(run: Run) -> Inputs | None:
    for entry in run.journal.steps(SHARED):
        if entry["kind"] == run.method.inputs:
            stored = safetensors_entries(run.work / "inputs.safetensors")
            values = {name: tensor.read().to(run.model.device) for name, tensor in stored.items()}
            return Inputs(entry["kind"], values, entry["leaders"])
    return None


def prune_blocks(run: Run, sparsities: Sequence[float]) -> None:
    """Second pass: prune each block on what the blocks pruned before it make of the calibration text."""
    done = len(run.journal.steps(PRUNED))
    with progress("Pruning blocks", run.blocks) as advance:
        advance(done)
        for index in range(done, run.blocks):
            _prune_block(run, index, sparsities[index])
            advance()


def _prune_block(run: Run, index: int, sparsity: float) -> None:
    tensors = run.model.read_block(index)
    digests = dict(zip(tensors, map_in_threads(tensor_sha256, tensors.values()), strict=True))
    block = run.model.block(index, tensors, run.length)
    inputs = _inputs_for(run, index, block)
    masks: dict[str, PackedMask] = {}
    kept = 0
    for linear, name in run.model.linear_weights(index).items():
        weight = block.linears[linear].weight.detach()
        known = None if inputs is None else inputs.of(linear)
        pruned = run.method.prune(weight, known, sparsity, run.pattern)
        keep, changed = run.model.as_stored(pruned.keep.cpu()).contiguous(), pruned.weight
        masks[name] = _packed(keep, tensors[name], digests[name])
        kept += int(np.count_nonzero(keep.numpy()))
        if changed is None:
            zero_pruned(tensors[name], keep)
        else:
            tensors[name] = run.model.as_stored(changed).to("cpu", tensors[name].dtype).contiguous()
        # The next block sees what the checkpoint will hold, rounded to its dtype.
        weight.copy_(run.model.as_stored(tensors[name]))
    write_shard(run.shard(index + 1), tensors)
    # The digest of the whole model is not known before the last block; the merged file gets it.
    write_masks(run.masks(index), masks, identity_of(run.model.decoder, run.model.checkpoint.location, ""))
    if inputs is not None and index + 1 < run.blocks:
        _advance_hidden_states(run, index, block)
    run.journal.append(PRUNED, block=index, kept=kept, digests=digests)


def _packed(keep: torch.Tensor, source: torch.Tensor, digest: str) -> PackedMask:
    rows, columns = source.shape
    return PackedMask((rows, columns), pack_mask(keep), digest, sign_sample(source))


def _inputs_for(run: Run, index: int, block: Block) -> Inputs | None:
    if run.method.inputs == "nothing":
        return None
    shared = _shared_inputs(run) if index == 0 else None
    return shared or measure_inputs(block, run.entering(index), run.method.inputs, run.model.device)


def _advance_hidden_states(run: Run, index: int, block: Block) -> None:
    source, target = run.entering(index), run.leaving(index)
    for windows in source.batches():
        target.write(windows, block.run(source.read(windows).to(run.model.device)))
    target.sync()


def write_outside_tensors(run: Run) -> dict[str, str]:
    """Write the shards around the blocks. Returns the digests of their tensors."""
    embedding = f"{run.model.decoder.family.embedding}.weight"
    after = [name for name in run.model.outside_names() if name != embedding]
    digests: dict[str, Any] = {}
    for shard, names in ((0, [embedding]), (run.blocks + 1, after)):
        tensors = {name: run.model.checkpoint.tensor(name) for name in names}
        digests |= {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
        write_shard(run.shard(shard), tensors)
    return digests
