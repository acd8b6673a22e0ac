"""What torch says of a model on one real text: the logits that every exported graph is held against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..blocks import logits_of
from ..calibration import evaluation_windows
from ..models import ModelFiles, load_config, load_tokenizer
from ..outline import outline_of

REFERENCE_FILE = "reference.safetensors"
PROMPT = 64
DECODED = 32


@dataclass(frozen=True)
class Reference:
    """`ids` int64 [n]; `logits` float32 [n - prompt + 1, vocabulary]: after the prompt, and after each
    later token. `graph_logits`, of the same shape, are those of ONNX Runtime on the very same graph."""

    ids: np.ndarray
    prompt: int
    logits: np.ndarray
    graph_logits: np.ndarray | None = None


def torch_reference(files: ModelFiles) -> Reference:
    """Logits of a checkpoint in fp32 torch, one decoder block in memory at a time.

    The text is the built-in evaluation text, which is never calibrated on: a prompt of 64 tokens and
    32 more, or less in that proportion where the model's positions end earlier.
    """
    length = min(PROMPT + DECODED, outline_of(load_config(files)).max_positions)
    prompt = length * PROMPT // (PROMPT + DECODED)
    ids = evaluation_windows("builtin", load_tokenizer(files), 1, length).ids
    (logits,) = logits_of(files, ids)
    return Reference(ids[0].numpy(), prompt, logits[prompt - 1 :].numpy())


def write_reference(folder: Path, reference: Reference) -> None:
    tensors = {
        "ids": reference.ids,
        "prompt": np.array(reference.prompt, dtype=np.int64),
        "logits": np.ascontiguousarray(reference.logits),
    }
    if reference.graph_logits is not None:
        tensors["graph_logits"] = np.ascontiguousarray(reference.graph_logits)
    save_file(tensors, folder / REFERENCE_FILE)


def read_reference(folder: Path) -> Reference:
    tensors = load_file(folder / REFERENCE_FILE)
    return Reference(tensors["ids"], int(tensors["prompt"]), tensors["logits"], tensors.get("graph_logits"))
