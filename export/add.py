"""Add verified graphs to an artifact, one at a time, its manifest up to date after each."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..artifact import (
    CHECKPOINT,
    RECIPE,
    Export,
    Manifest,
    Precision,
    StoredFile,
    check_files,
    list_files,
    read_manifest,
    write_manifest,
)
from ..calibration import TokenWindows
from ..checkpoint import open_checkpoint
from ..errors import UserError
from ..families import Outline
from ..models import ModelFiles, load_config, resolve_model
from ..outline import outline_of
from ..recipes.plan import group_size_of, recipe_from_pruning
from ..recipes.recipe import Recipe, write_recipe
from ..storage import drop_leftovers, replace_folder
from ..unfinished import LOCK, WORK
from .calibrated import quantization_text
from .exportable import require_exportable
from .plan import Graph
from .publish import export_graphs, finished_export
from .resumed import FOLDER as INTERRUPTED


def text_for(files: ModelFiles, graphs: Sequence[Graph], spec: str) -> TokenWindows | None:
    """The windows of text `spec` that `graphs` are quantized on; None where none of them reads any.

    Raises UserError when the text cannot be had.
    """
    if not any(graph.reads_text for graph in graphs):
        return None
    return quantization_text(files, outline_of(load_config(files)).max_positions, spec)


def _text_of(
    artifact: Path, manifest: Manifest, graphs: Sequence[Graph], calib: str | None
) -> TokenWindows | None:
    """The same for an artifact: text `calib`, or None for the one that it was pruned on. Where pruning read
    none it is that of the graphs there are, and for the first of them the built-in text.

    Raises UserError when the text cannot be had: a file may have been moved since pruning.
    """
    files = _pruned_files(artifact, manifest)
    earlier = (manifest.pruning.calibration, *(export.calibration for export in manifest.exports))
    known = next((record.source for record in earlier if record is not None), None)
    if calib is not None or known is None:
        return text_for(files, graphs, calib or "builtin")
    try:
        return text_for(files, graphs, known)
    except UserError as error:
        raise UserError(
            f"{error}; {artifact} was made on this text: name another one to quantize on with --calib"
        ) from None


def add_graphs(
    artifact: Path,
    graphs: Sequence[Graph],
    text: TokenWindows | None,
    dense: ModelFiles | None = None,
    anew: bool = False,
) -> None:
    """Export `graphs` into `artifact`, and list each in its manifest as soon as it is verified.

    `text` is what they are quantized on, if they read any. `dense` is the unpruned model; None fetches the
    one that the manifest names, if a graph needs it. Graphs that are there already, made as asked for, are
    kept and listed, unless `anew`; others take the place of what is in their folder. Raises UserError when
    the checkpoint was altered, and when the dense model is not the one that was pruned.
    """
    manifest = read_manifest(artifact)
    pruned = _pruned_files(artifact, manifest)
    for folder in {(artifact / graph.folder).parent for graph in graphs}:
        drop_leftovers(folder, but=INTERRUPTED)
    missing = list(graphs) if anew else _without_finished(artifact, pruned, graphs, text)
    if not missing:
        shutil.rmtree(artifact / INTERRUPTED, ignore_errors=True)
        return
    check_files(artifact, manifest, (f"{CHECKPOINT}/",))
    if dense is None and any(graph.dense for graph in missing):
        dense = _dense_model(manifest)
    head_pruned = manifest.pruning.head is not None
    export_graphs(artifact, pruned, dense, missing, text, partial(_publish, artifact, pruned), head_pruned)


def _dense_model(manifest: Manifest) -> ModelFiles:
    """The model that was pruned, from where it was. Raises UserError when another one is there now."""
    source = manifest.source
    dense = resolve_model(source.location)
    if open_checkpoint(dense).sha256 != source.sha256:
        raise UserError(
            f"{source.location} is not the model that was pruned (the SHA-256 of its weights differs): "
            "put that one back, or export with --baseline none"
        )
    return dense


def prepared_graphs(
    artifact: Path, graphs: Sequence[Graph], calib: str | None, force: bool
) -> tuple[tuple[Graph, ...], TokenWindows | None]:
    """`graphs`, each in the folder where there is a place for it, and the text that they are quantized on,
    if any: `calib`, or by default the one that the artifact was made on. Changes nothing.

    Raises UserError for those that the model cannot be exported to, for a text out of reach, and unless
    `force` for a graph that is there in another folder, made in another way or on another text, and when all
    are there: then there is nothing to go on with.
    """
    manifest = read_manifest(artifact)
    pruned = _pruned_files(artifact, manifest)
    require_exportable(pruned, graphs)
    text = _text_of(artifact, manifest, graphs, calib)
    placed = _placed(manifest, graphs)
    if not force:
        _refuse_existing(artifact, manifest, outline_of(load_config(pruned)), placed, text)
    return placed, text


def _placed(manifest: Manifest, graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """An engine's own folder stays with the precision that is in it, unless that is asked for too."""
    asked = {(graph.engine, graph.precision) for graph in graphs if not graph.dense}
    own: dict[str, Export] = {
        export.path: export for export in manifest.exports if export.path == export.engine
    }

    def placed(graph: Graph) -> Graph:
        there = own.get(graph.folder)
        if there is None or (there.engine, there.precision) in asked:
            return graph
        return replace(graph, folder=f"{graph.engine}-{graph.precision}")

    return tuple(placed(graph) for graph in graphs)


def _refuse_existing(
    artifact: Path, manifest: Manifest, decoder: Outline, graphs: Sequence[Graph], text: TokenWindows | None
) -> None:
    unlisted = []
    for graph in graphs:
        alike = manifest.export_for(graph.engine, graph.precision, graph.dense)
        folder = artifact / (alike.path if alike else graph.folder)
        finished = finished_export(artifact, graph, decoder, text)
        if folder.exists() and (finished is None or folder != artifact / graph.folder):
            raise UserError(f"{folder} exists; add --force to replace it")
        if finished is None or finished != alike:
            unlisted.append(graph)
    if not unlisted:
        raise UserError(f"{artifact / graphs[0].folder} exists; add --force to replace it")


def _without_finished(
    artifact: Path, pruned: ModelFiles, graphs: Sequence[Graph], text: TokenWindows | None
) -> list[Graph]:
    """Those of `graphs` that are not there yet; the others are listed in the manifest, if need be."""
    decoder = outline_of(load_config(pruned))
    missing = []
    for graph in graphs:
        finished = finished_export(artifact, graph, decoder, text)
        if finished is None:
            missing.append(graph)
        elif finished not in read_manifest(artifact).exports:
            _drop(artifact, [graph.folder])
            _list(artifact, pruned, finished)
    return missing


def _publish(artifact: Path, pruned: ModelFiles, folder: Path, export: Export) -> None:
    """Give a finished graph its name, in place of what is there and of its like elsewhere.

    The manifest never lists what is not there: what goes is dropped from it before, what comes is added
    behind. A graph of another precision that has the folder moves to one of its own.
    """
    manifest = read_manifest(artifact)
    alike = manifest.export_for(export.engine, export.precision, export.dense)
    for there in manifest.exports:
        if there.path == export.path and there != alike and (artifact / there.path).is_dir():
            _move(artifact, there)
    gone = {export.path, *([alike.path] if alike else [])}
    _drop(artifact, gone)
    replace_folder(folder, artifact / export.path)
    for path in gone - {export.path}:
        shutil.rmtree(artifact / path, ignore_errors=True)
    _list(artifact, pruned, export)


def _move(artifact: Path, export: Export) -> None:
    """Move a graph from its engine's own folder to one that is named for its precision."""
    folder = f"{export.engine}-{export.precision}"
    files = [file for file in read_manifest(artifact).files if file.path.startswith(f"{export.path}/")]
    moved = [file.model_copy(update={"path": folder + file.path.removeprefix(export.path)}) for file in files]
    _drop(artifact, [export.path])
    replace_folder(artifact / export.path, artifact / folder)
    manifest = read_manifest(artifact)
    exports = (*manifest.exports, export.model_copy(update={"path": folder}))
    write_manifest(
        artifact, manifest.model_copy(update={"exports": exports, "files": (*manifest.files, *moved)})
    )


def _drop(artifact: Path, folders: Collection[str]) -> None:
    """Take graphs out of the manifest, with their files."""
    manifest = read_manifest(artifact)
    exports = tuple(export for export in manifest.exports if export.path not in folders)
    below = tuple(f"{folder}/" for folder in folders)
    files = tuple(file for file in manifest.files if not file.path.startswith(below))
    write_manifest(artifact, manifest.model_copy(update={"exports": exports, "files": files}))


def _list(artifact: Path, pruned: ModelFiles, export: Export) -> None:
    """Add a graph to the manifest, with its files, and bring the recipe up to date."""
    manifest = read_manifest(artifact)
    manifest = manifest.model_copy(update={"exports": (*manifest.exports, export)})
    if not export.dense:
        write_recipe(artifact / RECIPE, _recipe(manifest, pruned))
    files = _listed_files(artifact, [file for file in manifest.files if file.path != RECIPE])
    write_manifest(artifact, manifest.model_copy(update={"files": files}))


def _listed_files(artifact: Path, known: Sequence[StoredFile]) -> tuple[StoredFile, ...]:
    return tuple(file for file in list_files(artifact, known) if not file.path.startswith((f"{WORK}/", LOCK)))


def _pruned_files(artifact: Path, manifest: Manifest) -> ModelFiles:
    return ModelFiles(manifest.source.name, str(artifact), artifact / CHECKPOINT)


def _recipe(manifest: Manifest, pruned: ModelFiles) -> Recipe:
    """The pruning, and the quantization of the sparse graphs."""
    decoder = outline_of(load_config(pruned))
    sparse = [export for export in manifest.exports if not export.dense]
    static = any(export.activations == "static" for export in sparse)
    return recipe_from_pruning(
        manifest.pruning,
        decoder.family,
        _own_precision(sparse),
        group_size_of(decoder),
        "static" if static else "dynamic",
    )


def _own_precision(sparse: Sequence[Export]) -> Precision:
    """That of the first graph in its engine's own folder."""
    return min(sparse, key=lambda export: export.path != export.engine).precision
