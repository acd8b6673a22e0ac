"""genai_config.json: what onnxruntime-genai wants to know of a graph that it runs.

Its model type is the name of the family, or the one it has there; names of inputs and outputs are those that
dlp_deploy.export.onnxruntime gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import decoder_of
from .graph import MODEL_FILE

GENAI_CONFIG = "genai_config.json"


def genai_config(config: Any, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of genai_config.json for a transformers config.

    `generation` is generation_config.json (or empty); its end tokens come first, as chat models name more
    of them there. What neither names is left out: the library then ends a text at the padding token, or at
    token 0, as it has no texts without an end. Greedy decoding is the default, as the graph says nothing of
    sampling.
    """
    decoder = decoder_of(config)
    ends = _first_stated(generation.get("eos_token_id"), config.eos_token_id)
    first = ends[0] if isinstance(ends, list) else ends
    tokens = {
        "bos_token_id": _first_stated(config.bos_token_id, first),
        "eos_token_id": ends,
        "pad_token_id": _first_stated(generation.get("pad_token_id"), config.pad_token_id, first),
    }
    return {
        "model": {
            "type": decoder.family.genai_type or decoder.family.name,
            "vocab_size": decoder.vocabulary,
            "context_length": decoder.max_positions,
            **{name: token for name, token in tokens.items() if token is not None},
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL_FILE,
                "hidden_size": decoder.hidden,
                "head_size": decoder.head_dim,
                "num_attention_heads": decoder.heads,
                "num_key_value_heads": decoder.kv_heads,
                "num_hidden_layers": decoder.blocks,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": decoder.max_positions,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _first_stated(*tokens: int | list[int] | None) -> int | list[int] | None:
    """The first that names a token; 0 is one."""
    return next((token for token in tokens if token not in (None, [])), None)
