"""The tokenizer of an artifact as the server needs it: prompts and conversations in, text out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import first_line
from ..models import ModelFiles, load_tokenizer
from .failures import ApiError
from .protocol import Message


class Codec:
    """Token ids of prompts and conversations, and text of token ids; safe to use from several threads.

    `ends` are the tokens that end a text. The model has embeddings for `embedded` tokens: a tokenizer may
    have more, and often has fewer. Those below `vocabulary` are in both.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], embedded: int) -> None:
        self._tokenizer = tokenizer
        self.ends = ends
        # The tokenizer's own encode sets truncation on shared state with each call.
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._embedded = embedded
        # Numbers may be left out, so that counting is not enough.
        self.vocabulary = min(embedded, 1 + max(tokenizer.get_vocab().values()))

    def encode(self, prompt: str | list[int]) -> list[int]:
        """Ids of a prompt, with the special tokens that the model expects around a text.

        Raises ApiError (400) when there are none, or the model does not know one of them.
        """
        ids = list(self._rust.encode(prompt).ids) if isinstance(prompt, str) else prompt
        return self._known(ids, "prompt")

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks. Raises ApiError (400) as `encode`, and when
        the model has no chat template, or one that refuses the conversation."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        plain = [message.plain() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own refusals, and what its code stumbles over
            raise ApiError(400, f"the model's chat template: {first_line(error)}", param="messages") from None
        return self._known(list(self._rust.encode(text, add_special_tokens=False).ids), "messages")

    def _known(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, "the prompt is empty", param)
        if max(ids) >= self._embedded:
            message = f"token {max(ids)} is not in the model's vocabulary of {self._embedded}"
            raise ApiError(400, message, param)
        return ids

    def text_of(self, token: int) -> str:
        """What a token adds to a text, with the space that a decoder strips where a text begins."""
        return self.decode([token, token])[len(self.decode([token])) :]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._rust.decode(list(ids), skip_special_tokens=True))


def open_codec(files: ModelFiles, embedded: int) -> Codec:
    """The codec of a model's folder, see Codec. Raises UserError when it has no tokenizer."""
    tokenizer = load_tokenizer(files)
    return Codec(tokenizer, _end_tokens(files.folder, tokenizer), embedded)


def _end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """As generation_config.json, config.json and the tokenizer name them; chat models need all three."""
    ends = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ends.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in ends if token is not None)
