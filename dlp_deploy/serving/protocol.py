"""What clients send and get, in the words of OpenAI's completions and chat completions.

Fields that would change the answer and are not implemented are refused; others that clients send along
(user, metadata, ...) are accepted and have no effect.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .decoding import Piece
from .sampling import Sampling

MAX_STOPS = 16
MAX_PROMPTS = 64
# Not implemented: each with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    # Those that other servers add to OpenAI's.
    "top_k": (-1, 0),
    "min_p": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


def _whole_characters(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "Input should be valid Unicode")
    return text


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, AfterValidator(_whole_characters)]
Stop = Annotated[str, Field(min_length=1), AfterValidator(_whole_characters)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_implemented(self) -> _Request:
        for name, neutral in REFUSED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
                raise PydanticCustomError("unsupported", "not supported by this server", {"field": name})
        return self

    @property
    def sampling(self) -> Sampling:
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """One prompt or several, as text or as token ids."""

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
        ]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart]

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(parts)}


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None


@dataclass
class Choice:
    """What one prompt has brought so far."""

    text: str = ""
    tokens: int = 0
    reused: int = 0
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens, self.reused, self.finish = piece.tokens, piece.reused, piece.finish


@dataclass(frozen=True)
class Reply:
    """Bodies of the answer to one request, whole or in chunks."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        listed = [self._choice(index, choice) for index, choice in enumerate(choices)]
        head = self._head("chat.completion" if self.chat else "text_completion")
        return head | {"choices": listed, "usage": usage(choices, prompt_tokens)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that comes before the text of choice `index`, if there is one."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        if self.chat:
            return self._chunk(index, {"content": text} if text else {}, finish)
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
        return self._head("text_completion") | {"choices": [choice]}

    def closing(self, choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
        """The chunk with the usage, for clients that asked for it."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return head | {"choices": [], "usage": usage(choices, prompt_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        common = {"index": index, "logprobs": None, "finish_reason": choice.finish}
        if self.chat:
            return common | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return common | {"text": choice.text}


def usage(choices: Sequence[Choice], prompt_tokens: int) -> dict[str, Any]:
    """Tokens read and generated; those of the prompts that were still in the cache are counted apart."""
    generated = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(choice.reused for choice in choices)},
    }
