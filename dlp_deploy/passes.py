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

from .activations import Inputs, Kind, measure_inputs, measure_rows
from .artifact import CHECKPOINT
from .blocks import Block, BlockModel
from .checkpoint import safetensors_entries, shard_name, tensor_sha256, write_shard
from .hidden import HiddenStates
from .journal import EMBEDDED, HEAD, PRUNED, SCORED, SHARED, Journal
from .masking import Method, Pattern
from .progress import progress
from .recipes.masks import PackedMask, identity_of, pack_mask, sign_sample, write_masks, zero_pruned
from .scores import statistic_named, wanda_metric
from .threads import map_in_threads
from .unfinished import work_folder


@dataclass(frozen=True)
class Run:
    """What both passes work with: `ids` int64 [windows, length] or None, `folder` the growing artifact.

    `head_sparsity` is None where the head stays dense.
    """

    model: BlockModel
    method: Method
    pattern: Pattern
    ids: torch.Tensor | None
    folder: Path
    journal: Journal
    head_sparsity: float | None = None

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

    @property
    def head(self) -> Path:
        """The pruned head, until the last shard is written."""
        return self.work / "head.safetensors"

    @property
    def mask_files(self) -> list[Path]:
        """The masks of all blocks, and of the head if it is pruned."""
        return [self.masks(part) for part in range(self.blocks + (self.head_sparsity is not None))]

    def masks(self, block: int) -> Path:
        """The masks of a block; those behind the last one are of the head."""
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
        keep = run.model.as_stored(pruned.keep.cpu()).contiguous()
        masks[name] = _packed(keep, tensors[name], digests[name])
        kept += int(np.count_nonzero(keep.numpy()))
        changed = None if pruned.weight is None else run.model.as_stored(pruned.weight)
        tensors[name] = _kept_weights(tensors[name], keep, changed)
        # The next block sees what the checkpoint will hold, rounded to its dtype.
        weight.copy_(run.model.as_stored(tensors[name]))
    write_shard(run.shard(index + 1), tensors)
    # The digest of the whole model is not known before the last block; the merged file gets it.
    write_masks(run.masks(index), masks, identity_of(run.model.decoder, run.model.checkpoint.location, ""))
    if inputs is not None and (index + 1 < run.blocks or run.head_sparsity is not None):
        _advance_hidden_states(run, index, block)
    run.journal.append(PRUNED, block=index, kept=kept, digests=digests)


def _kept_weights(stored: torch.Tensor, keep: torch.Tensor, changed: torch.Tensor | None) -> torch.Tensor:
    """What the checkpoint will hold for `stored`, in its dtype: what is kept of it, or became of that."""
    if changed is not None:
        return changed.to("cpu", stored.dtype).contiguous()
    zero_pruned(stored, keep)
    return stored


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


def prune_head(run: Run) -> None:
    """Behind both passes: prune the head, if that was asked for, on what the pruned blocks and the final norm
    make of the text. A head that is tied to the embedding becomes one of its own."""
    if run.head_sparsity is None or run.journal.steps(HEAD):
        return
    with progress("Pruning the head", 1) as advance:
        name, stored = run.model.head()
        weight, known = stored.to(run.model.device, torch.float32), _head_inputs(run)
        pruned = run.method.prune(weight, known, run.head_sparsity, run.pattern)
        keep = pruned.keep.cpu()
        mask = _packed(keep, stored, tensor_sha256(stored))
        write_shard(run.head, {name: _kept_weights(stored, keep, pruned.weight)})
        identity = identity_of(run.model.decoder, run.model.checkpoint.location, "")
        write_masks(run.masks(run.blocks), {name: mask}, identity)
        run.journal.append(HEAD, kept=int(np.count_nonzero(keep.numpy())), weights=keep.numel())
        advance()


def _head_inputs(run: Run) -> torch.Tensor | None:
    if run.method.inputs == "nothing":
        return None
    return measure_rows(run.model.final_states(run.leaving(run.blocks - 1)), run.method.inputs)


def write_outside_tensors(run: Run) -> dict[str, str]:
    """Write the shards around the blocks. Returns the digests of the dense model's tensors in them."""
    embedding = f"{run.model.decoder.family.embedding}.weight"
    after = [name for name in run.model.outside_names() if name != embedding]
    digests: dict[str, Any] = {}
    for shard, names in ((0, [embedding]), (run.blocks + 1, after)):
        tensors = {name: run.model.checkpoint.tensor(name) for name in names}
        digests |= {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
        if shard and run.head_sparsity is not None:
            tensors |= {name: pruned.read() for name, pruned in safetensors_entries(run.head).items()}
        write_shard(run.shard(shard), tensors)
    return digests
