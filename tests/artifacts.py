"""Small finished artifacts: really pruned, really exported."""

from __future__ import annotations

from pathlib import Path

from dlp_deploy.artifact import CHECKPOINT, Export, list_files, read_manifest, write_manifest
from dlp_deploy.checkpoint import open_checkpoint
from dlp_deploy.export.companions import write_companions
from dlp_deploy.export.decoder import Weights
from dlp_deploy.export.plan import plan_graphs
from dlp_deploy.export.write import write_graph
from dlp_deploy.families import decoder_of
from dlp_deploy.models import load_config, resolve_model
from dlp_deploy.pruning import prune


def pruned(model: Path, output: Path, sparsity: float = 0.7) -> Path:
    """The artifact of `model` before export: checkpoint, masks, recipe, manifest."""
    options = {"method": "magnitude", "allocation": "uniform", "calib": "builtin"}
    return prune(str(model), sparsity, **options, nsamples=1, seqlen=16, output=output)  # type: ignore[arg-type]


def with_graphs(artifact: Path, quant: str, target: str) -> Path:
    """Add graphs to an artifact, without the checks of a real export, which have tests of their own."""
    files = resolve_model(str(artifact / CHECKPOINT))
    config = load_config(files)
    decoder = decoder_of(config)
    weights = Weights(open_checkpoint(files), decoder)
    exports = []
    for graph in plan_graphs(quant, target, "none"):
        folder = artifact / graph.folder
        written = write_graph(folder, graph, weights, decoder, config, lambda: None)
        write_companions(folder, files.folder, config, graph.engine)
        exports.append(
            Export(
                path=graph.folder,
                engine=graph.engine,
                precision=graph.precision,
                dense=False,
                sparsity=0.0,
                rounded_to_zero=0.0,
                weight_bytes=written.weight_bytes,
                opset=written.opset,
            )
        )
    sealed(artifact, tuple(exports))
    return artifact


def sealed(artifact: Path, exports: tuple[Export, ...]) -> None:
    """Write the manifest anew, for the files that the artifact has now."""
    manifest = read_manifest(artifact)
    write_manifest(artifact, manifest.model_copy(update={"exports": exports, "files": list_files(artifact)}))
