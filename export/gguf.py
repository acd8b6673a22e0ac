"""The decoder as a GGUF file for llama.cpp: metadata, tensor names and layouts of its convert_hf_to_gguf.py.

Written tensor by tensor, in the memory of the largest one. There is no vocabulary in it (tokenizer model
"no_vocab"): it is for token ids, and the tokenizer lies beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION
from gguf.quants import quantize

from ..errors import UserError
from ..families import Decoder
from ..gguf_model import ARCHITECTURES, ROPE_FACTORS, block_modules
from .decoder import Weights
from .plan import GGUF_BLOCK as BLOCK
from .plan import Graph
from .quantize import Quantized
from .rotary import frequencies, rope_theta, unscaled_frequencies

MODEL_FILE = "model.gguf"
F32, Q8_0, Q4_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0
KINDS = {"fp32": F32, "int8": Q8_0, "int4": Q4_0}
FILE_TYPES = {
    F32: LlamaFileType.ALL_F32,
    Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Q4_0: LlamaFileType.MOSTLY_Q4_0,
}
# Mistral without a sliding window is a llama, in llama.cpp too.
NAMES = {model_type: name for name, model_type in ARCHITECTURES.items()} | {"mistral": "llama"}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file, of torch's shape; `read` gives it as stored, [out, in] or [out, bytes]."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        inputs, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // inputs * size


def write_gguf(
    folder: Path,
    graph: Graph,
    weights: Weights,
    decoder: Decoder,
    config: Any,
    advance: Callable[[], None],
    kept: Collection[str] = (),
) -> tuple[Path, int]:
    """Write model.gguf below `folder`; its path and the bytes of its weights. `kept` layers stay float32.

    Linear layers are F32 (fp32), Q8_0 (int8) or Q4_0 (int4), and so is the head; the embedding, of which a
    token reads a row, has 8 bits in both quantized kinds. Raises UserError for a model that llama.cpp would
    compute otherwise.
    """
    require_known(decoder, config)
    folder.mkdir(parents=True, exist_ok=True)
    path, file = folder / MODEL_FILE, _File(graph, weights, decoder, config, kept)
    tensors = list(file.tensors())
    writer = GGUFWriter(path, NAMES[decoder.family.name])
    try:
        _describe(writer, decoder, config, file.kind)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return path, sum(_write(writer, tensor, advance) for tensor in tensors)
    finally:
        writer.close()


def require_known(decoder: Decoder, config: Any) -> None:
    """Raise UserError for arithmetic that llama.cpp does not have, or has under another description."""
    remedy = "leave out llamacpp in --target and --baseline"
    family = decoder.family.name
    if family not in NAMES:
        raise UserError(f"{family} models are not written for llama.cpp ({', '.join(NAMES)} are); {remedy}")
    if any(decoder.windows):
        raise UserError(f"sliding windows are not written for llama.cpp; {remedy}")
    if decoder.activation != "silu" or decoder.rotary_dim != decoder.head_dim:
        raise UserError(f"this variant of {family} is not known to llama.cpp; {remedy}")
    _, magnified = frequencies(config, decoder)
    if magnified != 1 or (_has_factors(decoder, config) and NAMES[family] != "llama"):
        raise UserError(f"the scaled rotary embedding of this model is not written for llama.cpp; {remedy}")
    for inputs in (decoder.hidden, decoder.intermediate, decoder.heads * decoder.head_dim):
        if inputs % BLOCK:
            raise UserError(
                f"llama.cpp quantizes {BLOCK} inputs at a time, and a layer has {inputs}; {remedy}"
            )


def _write(writer: GGUFWriter, tensor: _Tensor, advance: Callable[[], None]) -> int:
    array = np.ascontiguousarray(tensor.read())
    writer.write_tensor_data(array)
    if tensor.name.endswith("ffn_down.weight"):
        advance()
    return array.nbytes


def _describe(writer: GGUFWriter, decoder: Decoder, config: Any, kind: GGMLQuantizationType) -> None:
    writer.add_context_length(decoder.max_positions)
    writer.add_block_count(decoder.blocks)
    writer.add_embedding_length(decoder.hidden)
    writer.add_feed_forward_length(decoder.intermediate)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_layer_norm_rms_eps(decoder.norm_epsilon)
    writer.add_rope_dimension_count(decoder.rotary_dim)
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_vocab_size(decoder.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _has_factors(decoder: Decoder, config: Any) -> bool:
    scaled, _ = frequencies(config, decoder)
    return not bool((scaled == unscaled_frequencies(config, decoder)).all())


@dataclass(frozen=True)
class _File:
    graph: Graph
    weights: Weights
    decoder: Decoder
    config: Any
    kept: Collection[str]

    @property
    def kind(self) -> GGMLQuantizationType:
        return KINDS[self.graph.precision]

    def tensors(self) -> Iterator[_Tensor]:
        """In the order of the forward pass, in which rounding on text wants them."""
        decoder, family = self.decoder, self.decoder.family
        table, head = f"{family.embedding}.weight", f"{family.head}.weight"
        kind = F32 if self.kind == F32 else Q8_0
        read = partial(_stored, kind, partial(self.weights.array, table))
        yield _Tensor("token_embd.weight", (decoder.vocabulary, decoder.hidden), kind, read)
        if _has_factors(decoder, self.config):
            yield _Tensor(ROPE_FACTORS, (decoder.rotary_dim // 2,), F32, self._rope_factors)
        for index in range(decoder.blocks):
            for name, module in block_modules(family).items():
                yield from self._module(f"blk.{index}.{name}", f"{family.block(index)}.{module}")
        yield from self._module("output_norm", family.final_norm)
        # llama.cpp takes the embedding for the head where there is none.
        if self.weights.shape(head) or self.kind == Q4_0 or family.head in self.kept:
            yield from self._module("output", family.head)

    def _module(self, name: str, module: str) -> Iterator[_Tensor]:
        """Weight and bias of a linear layer or a norm."""
        shape = self.weights.shape(f"{module}.weight") or (self.decoder.vocabulary, self.decoder.hidden)
        kind = F32 if len(shape) == 1 or module in self.kept else self.kind
        heads = self._permuted_heads(name)
        yield _Tensor(f"{name}.weight", shape, kind, partial(self._weight, module, kind, heads))
        if bias := self.weights.shape(f"{module}.bias"):
            yield _Tensor(f"{name}.bias", bias, F32, partial(self._bias, module, heads))

    def _permuted_heads(self, name: str) -> int:
        """llama.cpp rotates neighbouring channels in its llama, and the halves of a head elsewhere."""
        if NAMES[self.decoder.family.name] != "llama":
            return 0
        counts = {"attn_q": self.decoder.heads, "attn_k": self.decoder.kv_heads}
        return counts.get(name.split(".")[-1], 0)

    def _weight(self, module: str, kind: GGMLQuantizationType, heads: int) -> np.ndarray:
        if kind == Q4_0 and self.graph.grid is not None:
            rows = pack_q4_0(self.weights.quantized(module, self.graph.grid))
        else:
            rows = _stored(kind, partial(self.weights.linear, module))
        return permute(rows, heads) if heads else rows

    def _bias(self, module: str, heads: int) -> np.ndarray:
        bias = self.weights.array(f"{module}.bias")
        return permute(bias, heads) if heads else bias

    def _rope_factors(self) -> np.ndarray:
        """What llama.cpp divides the frequencies of the rotation by, float32 [rotary_dim / 2]."""
        scaled, _ = frequencies(self.config, self.decoder)
        return (unscaled_frequencies(self.config, self.decoder) / scaled).float().numpy()


def _stored(kind: GGMLQuantizationType, read: Callable[[], np.ndarray]) -> np.ndarray:
    return read() if kind == F32 else quantize(read(), kind)


def pack_q4_0(quantized: Quantized) -> np.ndarray:
    """Blocks of GGML's Q4_0, uint8 [out, in / 32 * 18], from levels with one scale per 32 inputs.

    A block is its scale in float16, and 16 bytes with the levels + 8 of inputs i (low) and i + 16 (high).
    """
    rows, inputs = quantized.levels.shape
    levels = (quantized.levels.reshape(rows, inputs // BLOCK, BLOCK) + 8).astype(np.uint8)
    packed = levels[..., : BLOCK // 2] | (levels[..., BLOCK // 2 :] << 4)
    scale = quantized.scale.astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate((scale, packed), axis=-1).reshape(rows, -1)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Channels (i, i + dim / 2) of each head become neighbours; [heads * dim, ...] to the same shape."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
