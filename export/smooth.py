"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, section 4): ease outliers of activations into weights.

An int8 scale per token is set by the token's largest channel, and a few channels of a language model
are a hundred times larger than the rest. Dividing channel j of a linear layer's input by s_j, in the
layer before it, and multiplying column j of its weight by s_j changes nothing but what is rounded.
Zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ..blocks import Block, BlockModel
from ..calibration import calibration_windows
from ..checkpoint import Checkpoint, open_checkpoint
from ..families import Decoder
from ..hidden import HiddenStates
from ..models import ModelFiles, load_tokenizer
from ..progress import progress
from .decoder import Weights

WINDOWS = 8
TOKENS_PER_WINDOW = 512
# The share of an outlier that moves into the weights; the paper's value for most models.
MIGRATION = 0.5


@dataclass(frozen=True)
class Smoothing:
    """Float32 factors by tensor name: `columns` [in] multiply a weight's inputs, `rows` [out] divide a
    layer's outputs (weight and bias), `norms` [hidden] divide a norm's weight."""

    columns: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]


class SmoothedWeights(Weights):
    """The weights of an equivalent model whose activations have smaller outliers."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, smoothing: Smoothing) -> None:
        super().__init__(checkpoint, decoder)
        self._smoothing = smoothing

    def norm(self, norm: str) -> np.ndarray:
        weight, divisor = super().norm(norm), self._smoothing.norms.get(norm)
        return weight if divisor is None else weight / divisor

    def norm_bias(self, norm: str) -> np.ndarray | None:
        bias, divisor = super().norm_bias(norm), self._smoothing.norms.get(norm)
        return bias if bias is None or divisor is None else bias / divisor

    def linear(self, layer: str) -> np.ndarray:
        weight = super().linear(layer)
        if layer in self._smoothing.columns:
            weight = weight * self._smoothing.columns[layer]
        if layer in self._smoothing.rows:
            weight = weight / self._smoothing.rows[layer][:, None]
        return weight

    def bias(self, layer: str) -> np.ndarray | None:
        bias, divisor = super().bias(layer), self._smoothing.rows.get(layer)
        return bias if bias is None or divisor is None else bias / divisor


def measure_smoothing(files: ModelFiles) -> Smoothing:
    """Factors for a checkpoint, from a pass over 8 windows of the built-in calibration text."""
    checkpoint = open_checkpoint(files)
    model = BlockModel(files, checkpoint)
    decoder = model.decoder
    length = min(TOKENS_PER_WINDOW, decoder.max_positions)
    ids = calibration_windows("builtin", load_tokenizer(files), WINDOWS, length, 0).ids
    smoothing = Smoothing({}, {}, {})
    with TemporaryDirectory(prefix="dlp-deploy-") as folder, progress("Smoothing", decoder.blocks) as advance:
        hidden = HiddenStates(Path(folder) / "hidden", (*ids.shape, decoder.hidden))
        for windows, states in model.embed(ids):
            hidden.write(windows, states)
        for index in range(decoder.blocks):
            block = model.block(index, model.read_block(index), length)
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
    factors = smoothing_factors(input_peak, weight_peak)
    smoothing.columns[family.head] = smoothing.norms[family.final_norm] = factors


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


def smoothing_factors(input_peak: np.ndarray, weight_peak: np.ndarray) -> np.ndarray:
    """s_j = max|x_j|^a / max|w_j|^(1 - a), section 4; 1 where a channel is all zeros. float32 [in]."""
    usable = (input_peak > 0) & (weight_peak > 0)
    x, w = np.where(usable, input_peak, 1.0), np.where(usable, weight_peak, 1.0)
    return (x**MIGRATION / w ** (1 - MIGRATION)).astype(np.float32)


def _add_block(
    smoothing: Smoothing, decoder: Decoder, index: int, peaks: Mapping[str, np.ndarray], block: Block
) -> None:
    family, prefix = decoder.family, decoder.family.block(index)
    *readers, output = family.attention
    *risers, down = family.mlp

    def weight_peak(*layers: str) -> np.ndarray:
        return np.max(
            [block.linears[layer].weight.abs().amax(0).numpy(force=True) for layer in layers], axis=0
        )

    def by_value_channel(peak: np.ndarray) -> np.ndarray:
        """The largest over the query heads that read one value head, [kv_heads * head_dim]."""
        return peak.reshape(decoder.kv_heads, decoder.group, decoder.head_dim).max(1).reshape(-1)

    def last_rows(layer: str, divisor: np.ndarray) -> np.ndarray:
        """Value and up are the last rows of a layer that others are fused into."""
        return np.pad(divisor, (block.linears[layer].out_features - len(divisor), 0), constant_values=1.0)

    attention = smoothing_factors(peaks[readers[0]], weight_peak(*readers))
    mlp = smoothing_factors(peaks[risers[0]], weight_peak(*risers))
    product = smoothing_factors(peaks[down], weight_peak(down))
    if not decoder.mlp_is_linear_in_up:
        product = np.ones_like(product)
    mixed = smoothing_factors(by_value_channel(peaks[output]), by_value_channel(weight_peak(output)))
    heads = mixed.reshape(decoder.kv_heads, 1, decoder.head_dim).repeat(decoder.group, 1).reshape(-1)
    factors = dict.fromkeys(readers, attention) | dict.fromkeys(risers, mlp) | {down: product, output: heads}
    smoothing.columns.update({f"{prefix}.{layer}": factor for layer, factor in factors.items()})
    value, up = readers[-1], risers[-1]
    smoothing.rows.update(
        {f"{prefix}.{value}": last_rows(value, mixed), f"{prefix}.{up}": last_rows(up, product)}
    )
    smoothing.norms.update(
        {f"{prefix}.{family.attention_norm}": attention, f"{prefix}.{family.mlp_norm}": mlp}
    )
