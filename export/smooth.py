"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, section 4): ease outliers of activations into weights.

An int8 scale per token is set by the token's largest channel, and a few channels of a language model
are a hundred times larger than the rest. Dividing channel j of a linear layer's input by s_j, in the
layer before it, and multiplying column j of its weight by s_j changes nothing but what is rounded.
Zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..blocks import Block, BlockModel
from ..checkpoint import Checkpoint, StoredTensor, untied_checkpoint
from ..families import Decoder, decoder_of
from ..hidden import HiddenStates
from ..models import ModelFiles
from ..progress import progress
from .decoder import Weights
from .inputs import TINY

# The share of an outlier that moves into the weights; the paper's value for most models.
# One scale for all tokens bears outliers less: it costs pruned SmolLM2 39 of a perplexity of 182 with 0.5,
# 10 with 0.7 and 22 with 0.85.
MIGRATION = 0.5
STATIC_MIGRATION = 0.7


@dataclass(frozen=True)
class Smoothing:
    """Float32 factors by module: `columns` [in] multiply the inputs that a linear layer's weight expects,
    `rows` [out] divide what a linear layer puts out, `norms` [hidden] what a norm puts out. `input_scales`
    are the int8 scales that hold all that entered each linear layer, once it is smoothed; `migration` is the
    share of an outlier that moved into the weights, None where none did."""

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)
    input_scales: dict[str, float] = field(default_factory=dict)
    migration: float | None = MIGRATION


def smoothed_checkpoint(checkpoint: Checkpoint, decoder: Decoder, smoothing: Smoothing) -> Checkpoint:
    """An equivalent model, in float32, whose activations have smaller outliers.

    Its head is a tensor of its own, even where the embedding of the model serves as head.
    """
    untied = untied_checkpoint(checkpoint, decoder.family)
    return Checkpoint(
        {name: _smoothed(name, untied.stored(name), decoder, smoothing) for name in untied.names()},
        checkpoint.location,
    )


def _smoothed(name: str, stored: StoredTensor, decoder: Decoder, smoothing: Smoothing) -> StoredTensor:
    module, _, part = name.rpartition(".")
    columns, rows, norm = (kind.get(module) for kind in (smoothing.columns, smoothing.rows, smoothing.norms))
    if columns is None and rows is None and norm is None:
        return stored
    # What the model adds to a norm's weight must be smoothed with it.
    offset = decoder.family.norm_offset if norm is not None and part == "weight" else 0.0
    divisor = norm if rows is None else rows

    def read() -> torch.Tensor:
        tensor = stored.read().to(torch.float32)
        if columns is not None and part == "weight":
            tensor = tensor * torch.from_numpy(columns)
        if divisor is not None:
            by_row = torch.from_numpy(divisor).reshape(-1, *(1,) * (tensor.ndim - 1))
            tensor = (tensor + offset) / by_row - offset
        return tensor

    return replace(stored, dtype=torch.float32, read=read)


def measure_smoothing(
    files: ModelFiles, checkpoint: Checkpoint, ids: torch.Tensor, migration: float | None = MIGRATION
) -> Smoothing:
    """Factors for a checkpoint, from a pass over `ids`, int64 [windows, length]. Without `migration` they are
    all 1, and only the scales of the inputs are of use."""
    model = BlockModel(files, checkpoint)
    decoder = decoder_of(model.config)
    smoothing = Smoothing(migration=migration)
    with TemporaryDirectory(prefix="dlp-deploy-") as folder, progress("Smoothing", decoder.blocks) as advance:
        hidden = HiddenStates(Path(folder) / "hidden", (*ids.shape, decoder.hidden))
        for windows, states in model.embed(ids):
            hidden.write(windows, states)
        for index in range(decoder.blocks):
            block = model.block(index, model.read_block(index), ids.shape[1])
            with _input_peaks(block) as peaks:
                for windows in hidden.batches():
                    hidden.write(windows, block.run(hidden.read(windows).to(model.device)))
            _add_block(smoothing, decoder, index, peaks, block)
            advance()
        _add_head(smoothing, model, hidden)
    return smoothing


def _add_head(smoothing: Smoothing, model: BlockModel, hidden: HiddenStates) -> None:
    family = model.decoder.family
    input_peak = np.max(
        [states.abs().amax(0).numpy(force=True) for states in model.final_states(hidden)], axis=0
    )
    weight_peak = np.abs(Weights(model.checkpoint, model.decoder).linear(family.head)).max(axis=0)
    factors = smoothing_factors(input_peak, weight_peak, smoothing.migration)
    smoothing.columns[family.head] = smoothing.norms[family.final_norm] = factors
    smoothing.input_scales[family.head] = _int8_scale(input_peak / factors)


@contextmanager
def _input_peaks(block: Block) -> Iterator[dict[str, np.ndarray]]:
    """max|x| of each input channel of the linear layers, filled in while the block runs."""
    peaks: dict[str, np.ndarray] = {}

    def watch(name: str, linear: torch.nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            peak = inputs[0].abs().flatten(0, -2).amax(0).cpu().numpy()
            peaks[name] = np.maximum(peaks[name], peak) if name in peaks else peak

        return linear.register_forward_pre_hook(see)

    handles = [watch(name, linear) for name, linear in block.linears.items()]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def smoothing_factors(input_peak: np.ndarray, weight_peak: np.ndarray, migration: float | None) -> np.ndarray:
    """s_j = max|x_j|^a / max|w_j|^(1 - a), section 4; 1 where a channel is all zeros, and without a migration
    a. float32 [in]."""
    if migration is None:
        return np.ones(len(input_peak), np.float32)
    usable = (input_peak > 0) & (weight_peak > 0)
    x, w = np.where(usable, input_peak, 1.0), np.where(usable, weight_peak, 1.0)
    return (x**migration / w ** (1 - migration)).astype(np.float32)


def _add_block(
    smoothing: Smoothing, decoder: Decoder, index: int, peaks: Mapping[str, np.ndarray], block: Block
) -> None:
    family, prefix = decoder.family, decoder.family.block(index)

    def weight_peak(layers: Sequence[str]) -> np.ndarray:
        return np.max(
            [block.linears[layer].weight.abs().amax(0).numpy(force=True) for layer in layers], axis=0
        )

    def ease(
        readers: Sequence[str], shared: Callable[[np.ndarray], np.ndarray] = lambda peak: peak
    ) -> np.ndarray:
        """Factors for the input that `readers` share, and the columns of their weights."""
        factors = smoothing_factors(
            shared(peaks[readers[0]]), shared(weight_peak(readers)), smoothing.migration
        )
        smoothing.columns.update({f"{prefix}.{layer}": factors for layer in readers})
        return factors

    def by_value_channel(peak: np.ndarray) -> np.ndarray:
        """The largest over the query heads that read one value head, for each of these heads."""
        heads = peak.reshape(decoder.kv_heads, decoder.group, decoder.head_dim)
        return np.broadcast_to(heads.max(1, keepdims=True), heads.shape).reshape(-1)

    def divide_last_rows(layer: str, factors: np.ndarray) -> None:
        """The layer that a product's second factor comes from may be the last part of a fused one."""
        rows = np.ones(block.linears[layer].out_features, np.float32)
        rows[-len(factors) :] = factors
        smoothing.rows[f"{prefix}.{layer}"] = rows

    *attention, output = family.attention
    *mlp, down = family.mlp
    smoothing.norms[f"{prefix}.{family.attention_norm}"] = ease(attention)
    smoothing.norms[f"{prefix}.{family.mlp_norm}"] = ease(mlp)
    mixed = ease([output], by_value_channel).reshape(decoder.kv_heads, decoder.group, decoder.head_dim)
    divide_last_rows(attention[-1], mixed[:, 0].reshape(-1))
    if decoder.mlp_is_linear_in_up:
        divide_last_rows(mlp[-1], ease([down]))
    for name, peak in peaks.items():
        layer = f"{prefix}.{name}"
        smoothing.input_scales[layer] = _int8_scale(peak / smoothing.columns.get(layer, 1.0))


def _int8_scale(peak: np.ndarray) -> float:
    """The scale whose 127 steps reach max(peak).

    Finer steps that cut off the rarest entries soon lose more: a few entries are fifty times the others,
    and attention relies on them. Of a perplexity of 167, pruned SmolLM2 pays 46 for this scale, 32 with one
    entry in a million cut off, and 212 with ten (at a migration of 0.5).
    """
    return max(float(peak.max()), TINY) / 127
