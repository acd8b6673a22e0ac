"""The main job: from a checkpoint to an artifact with verified graphs, in one resumable run."""

from __future__ import annotations

from pathlib import Path

from .export.plan import plan_graphs, require_engines


def prune_export(
    model: str,
    sparsity: float = 0.7,
    quant: str = "int8",
    method: str = "sparsegpt",
    allocation: str = "dlp",
    alpha: float | None = None,
    statistic: str | None = None,
    pattern: str = "unstructured",
    calib: str = "c4",
    nsamples: int = 128,
    seqlen: int = 2048,
    target: str = "deepsparse,onnxruntime",
    baseline: str = "fp32,int8,int4",
    rounding: str = "gptq",
    block_size: int | None = None,
    keep_fp32: str = "none",
    activations: str = "dynamic",
    smooth: bool = True,
    output: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    recipe: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    head_sparsity: float | None = None,
) -> Path:
    """Prune `model`, export it, and return the artifact's folder: `prune`, then `export`, see there.

    The folder gets its name when both are done. With `resume` an interrupted run goes on behind the
    last finished block or graph. Text `calib` is what is pruned on and what is quantized on. Raises
    UserError for what the user can mend.
    """
    graphs = plan_graphs(quant, target, baseline, rounding, block_size, keep_fp32, activations, smooth)
    require_engines(graphs)
    # Imported here: a wrong precision must not cost the import of torch to be told.
    from .export.add import add_graphs, text_for
    from .export.exportable import require_exportable
    from .models import resolve_model
    from .pruning import prune

    files = resolve_model(model)
    require_exportable(files, graphs)
    text = text_for(files, graphs, calib)
    return prune(
        model,
        sparsity=sparsity,
        method=method,
        allocation=allocation,
        alpha=alpha,
        statistic=statistic,
        pattern=pattern,
        calib=calib,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        device=device,
        output=output,
        recipe=recipe,
        resume=resume,
        force=force,
        head_sparsity=head_sparsity,
        suffix=f"-{graphs[0].precision}",
        then=lambda folder, dense: add_graphs(folder, graphs, text, dense),
    )
