"""Which runs a bench makes of an artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact import CHECKPOINT, Export, Manifest
from ..errors import UserError
from ..export.plan import BASELINE_ENGINES, baseline_name
from ..progress import say
from .engines import Engine, engine_named, engines
from .environments import interpreter, list_engines


@dataclass(frozen=True)
class Candidate:
    """One model in one engine. `model` is what the engine loads, `reference` the folder that holds
    the logits it must agree with. Candidates of the same `weights` had the same ones before quantization, in
    which `block_size` inputs came to share a scale (None: all, or no quantization)."""

    name: str
    engine: Engine
    precision: str
    dense: bool
    sparsity: float
    model: Path
    reference: Path
    weight_bytes: int
    weights: str
    block_size: int | None = None
    head_sparsity: float = 0.0
    notes: tuple[str, ...] = ()


def plan_runs(artifact: Path, manifest: Manifest, engine: str, baseline: str | None) -> tuple[Candidate, ...]:
    """Dense baselines first, then the sparse exports of each engine asked for.

    `engine` is a name, a comma-separated list or "all" (what is installed and exported for); `baseline`
    a comma-separated list such as "fp32,llamacpp-int8", "none", or None for all that the artifact holds
    and an installed engine runs. Raises UserError for what is unknown, not installed or not in the artifact.
    """
    dense = _baselines(artifact, manifest, baseline)
    sparse = [
        candidate
        for chosen in _engines(manifest, engine)
        for candidate in _sparse_runs(artifact, manifest, chosen)
    ]
    for candidate in (*dense, *sparse):
        interpreter(candidate.engine)
    return (*dense, *sparse)


def is_decoder(engine: Engine) -> bool:
    """Whether `engine` generates text; others run recipes only."""
    return bool(engine.precisions)


def _engines(manifest: Manifest, names: str) -> list[Engine]:
    if names == "all":
        exported = {export.engine for export in manifest.exports if not export.dense}
        return [
            status.engine
            for status in list_engines()
            if is_decoder(status.engine)
            and status.python
            and (status.engine.reads == CHECKPOINT or status.engine.name in exported)
        ]
    chosen = [engine_named(name) for name in _split(names)]
    for engine in chosen:
        if not is_decoder(engine):
            able = ", ".join(name for name, engine in engines().items() if is_decoder(engine))
            raise UserError(
                f"--engine {engine.name}: it runs recipes and generates no text; engines are: {able}"
            )
    if not chosen:
        raise UserError(f"--engine is empty; engines are: {', '.join(engines())}")
    return chosen


def _split(names: str) -> list[str]:
    """The names in a comma-separated list, each once: a run beside its twin would only cost time."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


def _sparse_runs(artifact: Path, manifest: Manifest, engine: Engine) -> list[Candidate]:
    if engine.reads == CHECKPOINT:
        return [_checkpoint_run(artifact, manifest, engine)]
    found = [export for export in manifest.exports if export.engine == engine.name]
    if not found:
        has = sorted({export.engine for export in manifest.exports if not export.dense})
        raise UserError(
            f"{artifact} has no graphs for {engine.name} (it has {', '.join(has) or 'none'}); "
            f"add them with: dlp-deploy export {artifact} --target {engine.name} --baseline none"
        )
    # An engine may be there for its dense baselines alone.
    return [_graph_run(artifact, manifest, export, engine) for export in found if not export.dense]


def _baselines(artifact: Path, manifest: Manifest, precisions: str | None) -> list[Candidate]:
    dense = sorted(
        (export for export in manifest.exports if export.dense),
        key=lambda export: BASELINE_ENGINES.index(export.engine),
    )
    found: dict[str, Export] = {baseline_name(export.engine, export.precision): export for export in dense}
    if precisions is None:
        wanted: Sequence[str] = _installed(found)
    elif precisions == "none":
        wanted = ()
    else:
        wanted = _split(precisions)
    for precision in wanted:
        if precision not in found:
            raise UserError(
                f"{artifact} has no dense {precision} baseline (it has {', '.join(found) or 'none'}); "
                f"add it with: dlp-deploy export {artifact} --target none --baseline {precision}"
            )
    return [_graph_run(artifact, manifest, found[name], engine_named(found[name].engine)) for name in wanted]


def _installed(baselines: Mapping[str, Export]) -> list[str]:
    """Those whose engine is there; the others are said to be left out."""
    status = {status.engine.name: status for status in list_engines()}
    for name, export in baselines.items():
        if status[export.engine].python is None:
            say(f"The dense baseline {name} is left out; to measure it: {status[export.engine].advice}")
    return [name for name, export in baselines.items() if status[export.engine].python]


def _graph_run(artifact: Path, manifest: Manifest, export: Export, engine: Engine) -> Candidate:
    kind = "dense" if export.dense else _sparsity_label(manifest)
    folder, head = artifact / export.path, manifest.pruning.head
    return Candidate(
        name=f"{engine.name}-{export.precision}-{kind}",
        engine=engine,
        precision=export.precision,
        dense=export.dense,
        sparsity=export.sparsity,
        model=folder / engine.model_file,
        reference=folder,
        weight_bytes=export.weight_bytes,
        weights="dense" if export.dense else "pruned",
        head_sparsity=0.0 if export.dense or head is None else head.measured,
        block_size=export.block_size,
        notes=export.notes,
    )


def _checkpoint_run(artifact: Path, manifest: Manifest, engine: Engine) -> Candidate:
    """The pruned checkpoint itself, in float32; its reference is that of any sparse graph."""
    graphs = [export for export in manifest.exports if not export.dense]
    if not graphs:
        raise UserError(
            f"{artifact} has no graphs and so no reference; add some with: dlp-deploy export {artifact}"
        )
    return Candidate(
        name=f"{engine.name}-fp32-{_sparsity_label(manifest)}",
        engine=engine,
        precision="fp32",
        dense=False,
        sparsity=manifest.pruning.sparsity,
        model=artifact / CHECKPOINT,
        reference=artifact / graphs[0].path,
        weight_bytes=4 * _parameters(manifest),
        weights="pruned",
    )


def _parameters(manifest: Manifest) -> int:
    """Those of the pruned model, whose head may be one of its own where that of the dense model was not."""
    head = manifest.pruning.head
    return manifest.source.parameters + (head.weights if head is not None and head.untied else 0)


def _sparsity_label(manifest: Manifest) -> str:
    """The sparsity of the masks, e.g. "s70"; quantization may add some zeros to that."""
    return f"s{100 * manifest.pruning.sparsity:.0f}"
