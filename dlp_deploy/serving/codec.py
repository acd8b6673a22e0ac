"""The tokenizer of an artifact as the server needs it: prompts and conversations in, text out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from ..models import ModelFiles, load_tokenizer
from .failures import ApiError
from .protocol import Message


class Codec:
    """Token ids of prompts and conversations, and text of token ids; safe to use from several threads.

    `ends` are the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.ends = ends
        # The tokenizer's own encode sets truncation on shared state with each call.
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self.vocabulary = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects around one."""
        return list(self._rust.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks. Raises ApiError (400)."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        plain = [message.plain() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template: {error}", param="messages") from None
        return list(self._rust.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(ids), skip_special_tokens=True))


def open_codec(files: ModelFiles) -> Codec:
    """The codec of a model's folder. Raises UserError when it has no tokenizer."""
    tokenizer = load_tokenizer(files)
    return Codec(tokenizer, _end_tokens(files.folder, tokenizer))


def _end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """As generation_config.json, config.json and the tokenizer name them; chat models need all three."""
    ends = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ends.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in ends if token is not None)
