"""The files beside a graph that other people's tools want."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..artifact import EngineName
from ..families import is_described
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
        write_json(folder / GENAI_CONFIG, genai_config(config, stated))
