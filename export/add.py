"""Add verified graphs to an artifact, and bring its manifest up to date."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..artifact import (
    CHECKPOINT,
    RECIPE,
    Export,
    Manifest,
    Precision,
    list_files,
    read_manifest,
    write_manifest,
)
from ..errors import UserError
from ..models import ModelFiles, load_config, resolve_model
from ..outline import outline_of
from ..recipes.plan import group_size_of, recipe_from_pruning
from ..recipes.recipe import Recipe, write_recipe
from ..unfinished import LOCK, WORK
from .plan import Graph
from .publish import export_graphs
from .traced import require_exportable


def add_graphs(artifact: Path, graphs: Sequence[Graph], dense: ModelFiles | None = None) -> None:
    """Export `graphs` into `artifact` and list them in its manifest.

    `dense` is the unpruned model; None fetches the one that the manifest names, if a graph needs it.
    Graphs that are there already are kept.
    """
    manifest = read_manifest(artifact)
    pruned = _pruned_files(artifact, manifest)
    if dense is None and any(graph.dense for graph in graphs):
        dense = resolve_model(manifest.source.location)
    exports = export_graphs(artifact, pruned, dense, graphs)
    added = {export.path for export in exports}
    kept = [export for export in manifest.exports if export.path not in added]
    if any(not export.dense for export in exports):
        write_recipe(artifact / RECIPE, _recipe(manifest, pruned, exports))
    known = [file for file in manifest.files if file.path != RECIPE]
    files = tuple(
        file for file in list_files(artifact, known) if not file.path.startswith((f"{WORK}/", LOCK))
    )
    write_manifest(artifact, manifest.model_copy(update={"exports": (*kept, *exports), "files": files}))


def remove_graphs(artifact: Path, graphs: Sequence[Graph], force: bool) -> None:
    """Make room for `graphs`. Raises UserError when one is there, be it in another folder, and `force` is not
    given, or when the model is one that there is no way to export to them."""
    manifest = read_manifest(artifact)
    require_exportable(_pruned_files(artifact, manifest), graphs)
    alike = [manifest.export_for(graph.engine, graph.precision, graph.dense) for graph in graphs]
    folders = {graph.folder for graph in graphs} | {export.path for export in alike if export}
    there = sorted(folder for folder in folders if (artifact / folder).exists())
    if there and not force:
        raise UserError(f"{artifact / there[0]} exists; add --force to replace it")
    gone = tuple(f"{folder}/" for folder in there)
    exports = tuple(export for export in manifest.exports if export.path not in there)
    files = (
        tuple(file for file in manifest.files if not file.path.startswith(gone)) if gone else manifest.files
    )
    write_manifest(artifact, manifest.model_copy(update={"exports": exports, "files": files}))
    for folder in there:
        shutil.rmtree(artifact / folder)


def _pruned_files(artifact: Path, manifest: Manifest) -> ModelFiles:
    return ModelFiles(manifest.source.name, str(artifact), artifact / CHECKPOINT)


def _recipe(manifest: Manifest, pruned: ModelFiles, exports: Sequence[Export]) -> Recipe:
    """The pruning, and the quantization of the sparse graphs."""
    decoder = outline_of(load_config(pruned))
    static = any(export.activations == "static" for export in exports)
    return recipe_from_pruning(
        manifest.pruning,
        decoder.family,
        _own_precision(exports),
        group_size_of(decoder),
        "static" if static else "dynamic",
    )


def _own_precision(exports: Sequence[Export]) -> Precision:
    return next((export.precision for export in exports if not export.dense), "fp32")
