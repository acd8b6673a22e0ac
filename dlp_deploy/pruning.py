"""dlp-deploy prune: from a dense checkpoint to a pruned one, with masks, recipe and manifest."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .allocation import allocation_named, chosen_alpha, densities, in_steps
from .artifact import MANIFEST, BlockSparsity, CalibrationRecord, HeadSparsity, Pruning
from .blocks import BlockModel
from .calibration import TokenWindows, calibration_windows, stored_windows
from .checkpoint import open_checkpoint, write_shard
from .errors import UserError
from .families import Outline
from .journal import HEAD, PRUNED, RESUMED, SCORED, Journal
from .masking import method_named, parse_pattern
from .models import ModelFiles, load_config, load_tokenizer, resolve_model
from .outline import outline_of, untied_config
from .passes import Run, embed, prune_blocks, prune_head, score_blocks
from .recipes.plan import plan_of
from .recipes.ready_made import load_recipe
from .results import write_results
from .scores import statistic_named
from .storage import refuse_existing
from .unfinished import JOURNAL, unfinished_run, work_folder

ARTIFACTS = Path("artifacts")
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """How much of each block goes, by what rule, and of the head (None: nothing). `sparsities` are given by a
    recipe, or empty."""

    method: str
    allocation: str
    statistic: str | None
    alpha: float | None
    pattern: str
    sparsity: float
    sparsities: tuple[float, ...] = ()
    head_sparsity: float | None = None

    @property
    def reads_text(self) -> bool:
        """Whether activations are needed, for scores or for masks."""
        return self.statistic is not None or method_named(self.method).inputs != "nothing"


@dataclass(frozen=True)
class Text:
    """The calibration text as asked for."""

    calib: str
    nsamples: int
    seqlen: int
    seed: int


def prune(
    model: str,
    sparsity: float = 0.7,
    method: str = "sparsegpt",
    allocation: str = "dlp",
    alpha: float | None = None,
    statistic: str | None = None,
    pattern: str = "unstructured",
    calib: str = "c4",
    nsamples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str = "auto",
    output: str | Path | None = None,
    recipe: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    head_sparsity: float | None = None,
    *,
    suffix: str = "",
    then: Callable[[Path, ModelFiles], None] | None = None,
) -> Path:
    """Prune `model` and return the folder that holds the result.

    `sparsity` is the share of the decoder blocks' linear weights that become zero, exact over the model
    to the rounding of one weight a matrix. `allocation` spreads it over the blocks by the layer score
    `statistic` (None: the allocation's own), `method` chooses the weights within a layer. A `recipe`
    (file or ready-made name) replaces all of these. With `head_sparsity` the output head is pruned as well,
    by the same method and pattern, behind the last block; one that is tied to the embedding gets weights of
    its own. Memory: one decoder block, or the head where it is pruned, and for SparseGPT a few
    matrices of [in, in] float32 of its widest layer; the hidden states of the calibration windows are in
    files under `<output>.partial/`, where each finished block is final. A run that was stopped goes on
    from there with `resume`, to bit-identical results.

    `then` is called with the pruned artifact and the dense model before the folder gets its final name;
    `suffix` is added to the default name.

    Raises UserError for what the user can mend; finished blocks stay usable.
    """
    files = resolve_model(model)
    config = load_config(files)
    decoder = outline_of(config)
    plan = _plan(decoder, sparsity, method, allocation, alpha, statistic, pattern, recipe)
    if head_sparsity is not None:
        _check_head(head_sparsity, plan.pattern)
        untied_config(config)
        plan = replace(plan, head_sparsity=head_sparsity)
    text = Text(calib, nsamples, seqlen, seed)
    if plan.reads_text and seqlen > decoder.max_positions:
        raise UserError(f"--seqlen {seqlen} is longer than the {decoder.max_positions} positions of {model}")
    final = Path(output) if output is not None else ARTIFACTS / (_folder_name(files, plan) + suffix)
    refuse_existing(final, force)
    chosen = chosen_device(device)
    with unfinished_run(final, _settings(files, plan, text), resume, force) as folder:
        if not (folder / MANIFEST).is_file():
            _execute(files, plan, text, folder, chosen)
        if then is not None:
            then(folder, files)
    return final


def _plan(
    decoder: Outline,
    sparsity: float,
    method: str,
    allocation: str,
    alpha: float | None,
    statistic: str | None,
    pattern: str,
    recipe: str | Path | None,
) -> Plan:
    """Settle all defaults. Raises UserError for names and numbers that cannot be."""
    sparsities: tuple[float, ...] = ()
    if recipe is not None:
        asked = plan_of(load_recipe(recipe), decoder)
        method, pattern, sparsity, sparsities = asked.method, asked.pattern, asked.sparsity, asked.sparsities
        allocation, statistic, alpha = asked.allocation, None, asked.owl_lambda
        if asked.owl_m not in (None, 5):
            raise UserError(f"{recipe}: owl_m is {asked.owl_m}, but OWL is implemented for its default, 5")
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity {sparsity} is impossible; give a share in [0, 1), such as 0.7")
    method_named(method)
    _check_pattern(pattern, allocation, sparsity)
    if sparsities:
        return Plan(method, allocation, None, None, pattern, sparsity, sparsities)
    takes = allocation_named(allocation).statistic
    if takes is None:
        return Plan(method, allocation, None, None, pattern, sparsity)
    statistic_named(statistic or takes)
    return Plan(
        method, allocation, statistic or takes, chosen_alpha(allocation, sparsity, alpha), pattern, sparsity
    )


def _check_pattern(text: str, allocation: str, sparsity: float) -> None:
    pattern = parse_pattern(text)
    if pattern.pruned is None or pattern.group is None:
        return
    if allocation not in ("uniform", "recipe"):
        raise UserError(
            f"every block has the same sparsity with pattern {text}; give --allocation uniform, "
            f"or --pattern N:{pattern.group} to let it vary"
        )
    if not math.isclose(sparsity, pattern.pruned / pattern.group):
        raise UserError(f"pattern {text} prunes {pattern.pruned / pattern.group:g}; give that as --sparsity")


def _check_head(sparsity: float, text: str) -> None:
    if not 0 < sparsity < 1:
        raise UserError(
            f"--head-sparsity {sparsity} is impossible; give a share between 0 and 1, such as 0.5, or leave "
            "it out for a dense head"
        )
    pattern = parse_pattern(text)
    if pattern.group is None:
        return
    pruned = round(sparsity * pattern.group) if pattern.pruned is None else pattern.pruned
    nearest = min(max(pruned, 1), pattern.group - 1) / pattern.group
    if not math.isclose(sparsity, nearest):
        raise UserError(f"pattern {text} can prune {nearest:g} of the head; give that as --head-sparsity")


def _folder_name(files: ModelFiles, plan: Plan) -> str:
    return f"{files.name}-{plan.allocation}-s{100 * plan.sparsity:g}"


def chosen_device(device: str) -> str:
    """The device that "auto" means, or `device`. Raises UserError when it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {device} is not there; use --device auto or cpu") from None
    return device


def _settings(files: ModelFiles, plan: Plan, text: Text) -> dict[str, Any]:
    """All that the result depends on, for comparison when a run is resumed."""
    weights = [files.gguf] if files.gguf is not None else sorted(files.folder.glob("*model*"))
    sizes = {path.name: path.stat().st_size for path in weights}
    settings = {"model": files.location, "files": sizes, **asdict(plan), **asdict(text)}
    return json.loads(json.dumps(settings))


def _execute(files: ModelFiles, plan: Plan, text: Text, partial: Path, device: str) -> None:
    method = method_named(plan.method)
    journal = Journal(work_folder(partial) / JOURNAL)
    model = BlockModel(files, open_checkpoint(files), device)
    windows = _windows(files, text, partial) if plan.reads_text else None
    ids = None if windows is None else windows.ids
    run = Run(model, method, parse_pattern(plan.pattern), ids, partial, journal, plan.head_sparsity)
    _note_resumption(run)
    if not journal.steps(PRUNED):
        _check_room(run)
    embed(run)
    scores = score_blocks(run, plan.statistic) if plan.statistic is not None else None
    sparsities = _sparsities(run, plan, scores)
    prune_blocks(run, sparsities)
    prune_head(run)
    write_results(run, files, _record(run, plan, windows, scores, sparsities))


def _windows(files: ModelFiles, text: Text, partial: Path) -> TokenWindows:
    """The calibration windows, drawn once: a data set may be out of reach when the run is resumed."""
    path = work_folder(partial) / "windows.safetensors"
    if not path.is_file():
        tokenizer = load_tokenizer(files)
        drawn = calibration_windows(text.calib, tokenizer, text.nsamples, text.seqlen, text.seed)
        write_shard(path, {"ids": drawn.ids})
    return stored_windows(path, text.calib, text.seed)


def _note_resumption(run: Run) -> None:
    scored, pruned = len(run.journal.steps(SCORED)), len(run.journal.steps(PRUNED))
    if scored or pruned:
        run.journal.append(RESUMED, block=pruned if pruned else scored % run.blocks)


def _check_room(run: Run) -> None:
    """Raise UserError now rather than hours later when the disk cannot hold the result."""
    checkpoint = run.model.checkpoint
    needed = sum(
        torch.Size(checkpoint.shape(name)).numel() * checkpoint.dtype(name).itemsize
        for name in run.model.names()
    )
    if run.head_sparsity is not None:
        # In the work folder as well and, where it was tied, in the checkpoint.
        needed += 2 * run.model.head()[1].nbytes
    if run.ids is not None:
        needed += 3 * 4 * run.ids.numel() * run.model.decoder.hidden
    free = shutil.disk_usage(run.folder).free
    if free < needed:
        raise UserError(
            f"{run.folder.parent} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed; "
            "free space there or give --output on another disk"
        )


def _sparsities(run: Run, plan: Plan, scores: Sequence[float] | None) -> list[float]:
    """The sparsity of each block."""
    if plan.sparsities:
        return list(plan.sparsities)
    weights = np.array(run.model.prunable_weights(), dtype=np.float64)
    given = None if scores is None else np.array(scores)
    kept = densities(plan.allocation, given, weights, plan.sparsity, plan.alpha)
    if run.pattern.group is not None and run.pattern.pruned is None:
        kept = in_steps(kept, weights, run.pattern.group)
    return (1.0 - kept).tolist()


def _record(
    run: Run,
    plan: Plan,
    windows: TokenWindows | None,
    scores: Sequence[float] | None,
    sparsities: Sequence[float],
) -> Pruning:
    weights = run.model.prunable_weights()
    kept = [entry["kept"] for entry in run.journal.steps(PRUNED)]
    blocks = tuple(
        BlockSparsity(
            index=index,
            score=None if scores is None else scores[index],
            asked=sparsities[index],
            measured=1 - kept[index] / weights[index],
            weights=weights[index],
        )
        for index in range(run.blocks)
    )
    return Pruning(
        method=plan.method,
        allocation=plan.allocation,
        statistic=plan.statistic,
        alpha=plan.alpha,
        pattern=plan.pattern,
        sparsity_asked=plan.sparsity,
        sparsity=1 - sum(kept) / sum(weights),
        blocks=blocks,
        calibration=None if windows is None else calibration_record(windows),
        resumed_from_block=tuple(entry["block"] for entry in run.journal.steps(RESUMED)),
        head=_head_record(run),
    )


def _head_record(run: Run) -> HeadSparsity | None:
    if run.head_sparsity is None:
        return None
    (entry,) = run.journal.steps(HEAD)
    return HeadSparsity(
        asked=run.head_sparsity,
        measured=1 - entry["kept"] / entry["weights"],
        weights=entry["weights"],
        untied=run.model.decoder.tied_embeddings,
    )


def calibration_record(windows: TokenWindows) -> CalibrationRecord:
    """What the manifest says of the windows of a text."""
    count, length = windows.ids.shape
    return CalibrationRecord(
        source=windows.source,
        windows=count,
        tokens_per_window=length,
        seed=windows.seed,
        sha256=windows.sha256,
    )
