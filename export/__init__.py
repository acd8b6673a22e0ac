"""Write a checkpoint as ONNX decoder graphs for the engines, and prove that they say the same."""

from __future__ import annotations

from pathlib import Path

from ..artifact import read_manifest


def export(
    artifact: str | Path,
    quant: str = "int8",
    target: str = "deepsparse,onnxruntime",
    baseline: str = "fp32,int8,int4",
    rounding: str = "gptq",
    block_size: int | None = None,
    keep_fp32: str = "none",
    activations: str = "dynamic",
    smooth: bool = True,
    calib: str | None = None,
    force: bool = False,
) -> Path:
    """Add ONNX graphs to an artifact that prune made, and return its folder.

    `quant` lists precisions (fp32, int8, int4), the first being the artifact's own; `target` the
    engines, or is "none"; `baseline` the precisions of the dense model for ONNX Runtime (int8) or
    llama.cpp (llamacpp-int8), or "none": by default all of ONNX Runtime's, as only the strongest is a fair
    comparison. `rounding` is "gptq" (chosen on text, so that errors make up for each other) or "nearest" (at
    once); `block_size` is how many inputs share a scale in ONNX Runtime: by default 32, and 128 in dense
    baselines, where it is fastest. `keep_fp32` names the layers of the sparse graphs that are not quantized,
    as patterns, or is "auto": those that lose most for their size, until the weights have grown by 5 %.
    `activations` is how DeepSparse's int8 and int4 graphs scale what enters a linear layer: "dynamic" (each
    token by its own largest entry) or "static" (by one scale per layer, measured on text); ONNX Runtime
    scales it as it runs. With `smooth` their outliers are moved into the weights first (SmoothQuant). `calib`
    is the text that all of this is measured on, as for pruning; None is the text that the artifact was pruned
    on or, where pruning read none, the built-in one.

    Each graph is checked (structure, zeros, logits against torch) before it gets its final name and takes
    the place of an older one; until then nothing of the artifact is changed. A graph of another precision
    that is in an engine's own folder stays there, unless it is asked for again. After an interruption the
    same call goes on behind the last finished graph (with `force` those are made anew) and, where weights are
    rounded on text, behind the last finished block.

    Raises UserError for unknown names, for what cannot be exported, when the text is out of reach, when the
    dense model is not the one that was pruned, when another run writes to the artifact, and without `force`
    for graphs that are there, all of them or one that was made in another way or on another text. (Of graphs
    of older releases, which did not record their text, it is taken to be the same.)
    """
    # Imported here: naming a precision must not cost the import of torch.
    from ..unfinished import alone_in
    from .add import add_graphs, prepared_graphs
    from .plan import plan_graphs, require_engines

    folder = Path(artifact)
    graphs = plan_graphs(quant, target, baseline, rounding, block_size, keep_fp32, activations, smooth)
    require_engines(graphs)
    read_manifest(folder)
    with alone_in(folder):
        placed, text = prepared_graphs(folder, graphs, calib, force)
        add_graphs(folder, placed, text, anew=force)
    return folder
