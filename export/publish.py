"""From a checkpoint to verified graph folders: write, check, and only then give the final name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from ..artifact import CHECKPOINT, Activations, Export, OutputCheck
from ..bench.cgroups import available_memory
from ..bench.engines import Engine, engine_named, has_room
from ..bench.environments import list_engines
from ..calibration import TokenWindows
from ..checkpoint import Checkpoint, open_checkpoint
from ..families import Outline, decoder_of
from ..models import ModelFiles, load_config
from ..outline import outline_of
from ..progress import progress, say
from ..pruning import calibration_record
from ..storage import naming_full_disk, partial_folder, replace_folder, sync_files, write_text
from .calibrated import CalibratedWeights
from .companions import write_companions
from .decoder import Weights
from .inputs import Int8Inputs
from .plan import Graph
from .reference import Reference, torch_reference, write_reference
from .resumed import FOLDER, drop_rounded, graph_digest, inputs_digest, smoothing_below
from .sensitivity import choose_kept, measure_costs, named_layers
from .smooth import MIGRATION, STATIC_MIGRATION, Smoothing, measure_smoothing, smoothed_checkpoint
from .verify import (
    PLAIN_ONNXRUNTIME,
    VerificationError,
    check_structure,
    compare_logits,
    count_zeros,
    engine_logits,
    require_agreement,
)
from .write import write_graph

# The record of a finished graph folder; it lets an interrupted export go on behind the last one.
RECORD = "export.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint to export, and what is learnt from running it in torch (when first asked for).

    `text` is what quantization is measured on; None where no graph needs any. What an interrupted export
    need not do again is stored in `work`. `head_pruned` says that the head has zeros to keep, too.
    """

    files: ModelFiles
    text: TokenWindows | None
    work: Path
    head_pruned: bool = False
    # By the share of an outlier that they move.
    smoothings: dict[float | None, Smoothing] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Reference:
        return torch_reference(self.files)

    @property
    def windows(self) -> TokenWindows:
        if self.text is None:
            raise ValueError(f"there is no text to quantize {self.files.location} on")
        return self.text

    @cached_property
    def digest(self) -> str:
        return inputs_digest(open_checkpoint(self.files), self.windows)

    @cached_property
    def decoder(self) -> Outline:
        return outline_of(load_config(self.files))

    def smoothing(self, graph: Graph) -> Smoothing:
        share = STATIC_MIGRATION if graph.activations == "static" else MIGRATION
        migration = share if graph.smooth else None
        if migration not in self.smoothings:
            checkpoint, ids = open_checkpoint(self.files), self.windows.ids
            measure = partial(measure_smoothing, self.files, checkpoint, ids, migration)
            self.smoothings[migration] = smoothing_below(self.work, self.digest, migration, measure)
        return self.smoothings[migration]

    def checkpoint(self, graph: Graph) -> Checkpoint:
        checkpoint = open_checkpoint(self.files)
        if not (graph.int8_inputs and graph.smooth):
            return checkpoint
        decoder = decoder_of(load_config(self.files))
        return smoothed_checkpoint(checkpoint, decoder, self.smoothing(graph))

    def inputs(self, graph: Graph) -> Int8Inputs | None:
        """How the engine rounds what enters linear layers; None where it is fp32, or the engine's affair."""
        if not graph.int8_inputs:
            return None
        return Int8Inputs(self.smoothing(graph).input_scales if graph.activations == "static" else None)

    def kept(self, graph: Graph) -> tuple[str, ...]:
        """The layers that `graph` keeps in fp32. Raises UserError for a pattern that matches none."""
        if graph.keep_fp32 == "none" or graph.grid is None or graph.head_grid is None:
            return ()
        if graph.keep_fp32 != "auto":
            return named_layers(graph.keep_fp32, self.decoder.linear_groups())
        checkpoint = self.checkpoint(graph)
        costs = measure_costs(
            self.files, checkpoint, self.windows.ids, graph.grid, graph.head_grid, self.inputs(graph)
        )
        return choose_kept(costs, graph.grid)

    @contextmanager
    def weights(self, graph: Graph, kept: Sequence[str]) -> Iterator[Weights]:
        """The weights as `graph` wants them: smoothed, and rounded on text or to nearest.

        Blocks that were rounded are kept when the body fails, unless there are none.
        """
        checkpoint = self.checkpoint(graph)
        if graph.grid is None or graph.head_grid is None or not graph.calibrated:
            yield Weights(checkpoint, self.decoder)
            return
        folder = self.work / graph_digest(graph, kept, self.digest)
        weights = CalibratedWeights(
            checkpoint,
            self.files,
            self.windows.ids,
            graph.grid,
            graph.head_grid,
            self.inputs(graph),
            folder,
            kept,
        )
        if weights.finished:
            say(f"{graph.label}: {weights.finished} of {self.decoder.blocks} blocks were rounded before")
        try:
            yield weights
        finally:
            if not weights.finished:
                shutil.rmtree(folder)


def export_graphs(
    artifact: Path,
    pruned: ModelFiles,
    dense: ModelFiles | None,
    graphs: Sequence[Graph],
    text: TokenWindows | None,
    publish: Callable[[Path, Export], None] | None = None,
    head_pruned: bool = False,
) -> tuple[Export, ...]:
    """Write and verify `graphs` below `artifact`, each in place of what is in its folder.

    `dense` is the unpruned model, needed for baselines only; `text` what graphs are quantized on, needed for
    those that read any (`Graph.reads_text`). `publish` gives a finished folder its final
    name, as soon as it is verified. `head_pruned` says that the head's zeros must be in the graph as well.
    Raises VerificationError; whatever is raised, nothing is left of the failing graph but, when it was
    interrupted, what it had measured and rounded, and what was there before it still is.
    """
    work = artifact / FOLDER
    sources = {False: Source(pruned, text, work, head_pruned)}
    if dense:
        sources[True] = Source(dense, text, work)

    def put(folder: Path, export: Export) -> None:
        replace_folder(folder, artifact / export.path)

    exports = tuple(_export_one(artifact, sources[graph.dense], graph, publish or put) for graph in graphs)
    shutil.rmtree(work, ignore_errors=True)
    return exports


def _export_one(
    artifact: Path, source: Source, graph: Graph, publish: Callable[[Path, Export], None]
) -> Export:
    folder = partial_folder(artifact / graph.folder)
    try:
        with naming_full_disk(folder), _removed_on_failure(folder):
            export = _write_and_verify(folder, artifact / CHECKPOINT, source, graph)
            write_text(folder / RECORD, export.model_dump_json(indent=2) + "\n")
            sync_files(folder)
    except VerificationError:
        # The same weights would be refused again.
        drop_rounded(source.work)
        raise
    with naming_full_disk(artifact / graph.folder):
        publish(folder, export)
    drop_rounded(source.work)
    say(_summary(export))
    return export


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    """Begin with `folder` empty, and leave nothing of it when the body fails or is interrupted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def finished_export(
    artifact: Path, graph: Graph, decoder: Outline, text: TokenWindows | None
) -> Export | None:
    """What is in the folder of `graph`, if that is finished and made as `graph` asks for, on `text`."""
    record = artifact / graph.folder / RECORD
    try:
        found = Export.model_validate_json(record.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    if not (_is_export_of(found, graph, decoder) and _measured_on(found, graph, text)):
        return None
    # Its folder may have been moved since.
    return found.model_copy(update={"path": graph.folder})


def _write_and_verify(folder: Path, checkpoint: Path, source: Source, graph: Graph) -> Export:
    config, decoder = load_config(source.files), source.decoder
    kept, inputs = source.kept(graph), source.inputs(graph)
    with (
        source.weights(graph, kept) as weights,
        progress(f"Exporting {graph.label}", decoder.blocks) as advance,
    ):
        scales = inputs.scales if inputs else None
        written = write_graph(folder, graph, weights, decoder, config, advance, kept, scales)
        counted = count_zeros(written.model, weights, decoder, source.head_pruned)
    write_companions(folder, checkpoint, config, graph.engine)
    if graph.engine != "llamacpp":
        check_structure(written.model, graph.engine)
    engines, notes = _checking_engines(graph, written.weight_bytes)
    checks = _check_outputs(folder, written.model, source.reference, graph, engines)
    rounding, block_size, activations, smoothed = _quantization(graph)
    return Export(
        path=graph.folder,
        engine=graph.engine,
        precision=graph.precision,
        dense=graph.dense,
        sparsity=counted.sparsity,
        rounded_to_zero=counted.rounded_to_zero,
        weight_bytes=written.weight_bytes,
        opset=written.opset,
        rounding=rounding,
        block_size=block_size,
        keep_fp32=graph.keep_fp32 if graph.grid else "none",
        kept_fp32=kept,
        activations=activations,
        smoothed=smoothed,
        calibration=calibration_record(source.text) if source.text and graph.reads_text else None,
        checks=checks,
        notes=(*written.notes, *notes),
    )


def _quantization(graph: Graph) -> tuple[str | None, int | None, Activations | None, bool | None]:
    """What the manifest says of the rounding, how many inputs share a scale, and of int8 activations: what
    sets their scales, and whether they are smoothed."""
    if graph.grid is None:
        return None, None, None, None
    rounding = "gptq" if graph.calibrated else "nearest"
    inputs = (graph.activations, graph.smooth) if graph.int8_inputs else (None, None)
    return rounding, graph.grid.block, *inputs


def _is_export_of(export: Export, graph: Graph, decoder: Outline) -> bool:
    rounding, block_size, activations, smoothed = _quantization(graph)
    return (
        (export.engine, export.precision, export.dense) == (graph.engine, graph.precision, graph.dense)
        and (export.rounding, export.block_size, export.activations) == (rounding, block_size, activations)
        # Older releases smoothed always, and did not say so.
        and (export.smoothed is False) == (smoothed is False)
        and _keeps_as_asked(export, graph, decoder)
    )


def _measured_on(export: Export, graph: Graph, text: TokenWindows | None) -> bool:
    """Whether a graph that reads text has read this one. One that does not say, as older releases did not
    record it, counts as if: else an artifact's graphs would all be made anew for the next one."""
    if not graph.reads_text or export.calibration is None:
        return True
    return text is not None and export.calibration.sha256 == text.sha256


def _keeps_as_asked(export: Export, graph: Graph, decoder: Outline) -> bool:
    if graph.grid is None or graph.keep_fp32 == "none":
        return not export.kept_fp32
    if graph.keep_fp32 == "auto":
        # Older releases did not say which layers they were asked to keep.
        return export.keep_fp32 == "auto" or (export.keep_fp32 == "none" and bool(export.kept_fp32))
    return set(export.kept_fp32) == set(named_layers(graph.keep_fp32, decoder.linear_groups()))


def _check_outputs(
    folder: Path, model: Path, reference: Reference, graph: Graph, engines: Sequence[Engine]
) -> tuple[OutputCheck, ...]:
    """Run the graph in `engines`, and hold it against torch, and against ONNX Runtime if that is one."""
    logits: dict[str, np.ndarray] = {}
    with progress(f"Checking {graph.label}", len(engines) * len(reference.logits)) as advance:
        for engine in engines:
            moved = partial(advance, note=engine.title)
            moved(0)
            logits[engine.name] = engine_logits(engine, model, reference.ids, reference.prompt, moved)
    write_reference(folder, replace(reference, graph_logits=logits.get("onnxruntime")))
    checks = [compare_logits(name, "torch", found, reference.logits) for name, found in logits.items()]
    if len(engines) > 1:
        theirs, ours = logits[graph.engine], logits["onnxruntime"]
        checks.append(compare_logits(graph.engine, "onnxruntime", theirs, ours))
    require_agreement(checks, graph.precision, model)
    return tuple(checks)


def _checking_engines(graph: Graph, weight_bytes: int) -> tuple[list[Engine], tuple[str, ...]]:
    """The engines to check a graph in, and a note where its own is left out: it may be missing here, and
    memory may not hold what it makes of the weights. ONNX Runtime reads them where the file is mapped.

    llama.cpp alone runs GGUF files, so it must be.
    """
    if graph.engine == "llamacpp":
        return [engine_named(graph.engine)], ()
    if graph.engine == "onnxruntime":
        return [PLAIN_ONNXRUNTIME], ()
    own = engine_named(graph.engine)
    if not any(status.engine == own and status.python for status in list_engines()):
        return [PLAIN_ONNXRUNTIME], (f"not checked in {own.title}: it was not installed",)
    if not has_room(own, weight_bytes, available_memory()):
        say(f"{graph.label} is not checked in {own.title}: memory does not hold it")
        return [PLAIN_ONNXRUNTIME], (f"not checked in {own.title}: memory did not hold it",)
    return [PLAIN_ONNXRUNTIME, own], ()


def _summary(export: Export) -> str:
    errors = ", ".join(
        f"{check.engine} {check.max_rel_error:.1e}" for check in export.checks if check.reference == "torch"
    )
    return (
        f"{export.path}: {export.weight_bytes / 1e6:.0f} MB, sparsity {export.sparsity:.4f}, "
        f"max relative logit error against torch: {errors}"
    )
