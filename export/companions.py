"""The files beside a graph that other people's tools want."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..artifact import EngineName
from ..errors import UserError
from ..families import is_described
from ..models import ModelFiles, load_tokenizer
from ..storage import write_json
from .genai import GENAI_CONFIG, genai_config

# As transformers names them; not every checkpoint has all.
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def write_companions(folder: Path, checkpoint: Path, config: Any, engine: EngineName) -> None:
    """Make a graph folder one that transformers, optimum, DeepSparse and onnxruntime-genai load.

    `checkpoint` is the folder that holds the tokenizer and config files, `config` its transformers config.
    """
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    # onnxruntime-genai runs graphs whose past and present are shared buffers only.
    if engine == "onnxruntime" and is_described(config):
        generation = folder / "generation_config.json"
        stated = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        if stated.get("eos_token_id") is None and config.eos_token_id is None:
            stated["eos_token_id"] = _end_in_tokenizer(checkpoint)
        write_json(folder / GENAI_CONFIG, genai_config(config, stated))


def _end_in_tokenizer(checkpoint: Path) -> int | None:
    """The end token of a model whose configs name none, if its tokenizer does."""
    try:
        end: int | None = load_tokenizer(
            ModelFiles(checkpoint.name, str(checkpoint), checkpoint)
        ).eos_token_id
    except UserError:
        return None
    return end
