"""What clients send and get, in the words of OpenAI's completions and chat completions.

Fields that would change the answer and are not implemented are refused; others that clients send along
(user, metadata, ...) are accepted and have no effect.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .decoding import Piece
from .sampling import Sampling

MAX_STOPS = 16
MAX_PROMPTS = 64
# Of one request, for all its prompts.
MAX_CHOICES = 64
MAX_LIKELIEST = 20
# Not implemented: each with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
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
# That there are to be none is said like that too.
NoneForFalse = BeforeValidator(lambda value: None if value is False else value)
Likeliest = Annotated[int, Field(ge=0, le=MAX_LIKELIEST)]
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
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
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
    def choices(self) -> int:
        """How many texts are asked for each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """One prompt or several, as text or as token ids."""

    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LIKELIEST, strict=True), NoneForFalse] = None
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

    @property
    def limit(self) -> int | None:
        """The most tokens that are asked for, if any number is."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are asked for each place; None where no likelihoods are."""
        return self.logprobs


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
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None

    @model_validator(mode="after")
    def _refuse_likeliest_tokens_alone(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("alone", "needs logprobs to be true", {"field": "top_logprobs"})
        return self

    @property
    def limit(self) -> int | None:
        """As of a completion."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """As of a completion."""
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass
class Choice:
    """What one prompt has brought so far."""

    text: str = ""
    tokens: int = 0
    reused: int = 0
    finish: str | None = None
    scored: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        if piece.likelihood is not None:
            self.scored.append(piece)
        self.tokens, self.reused, self.finish = piece.tokens, piece.reused, piece.finish


@dataclass(frozen=True)
class Reply:
    """Bodies of the answer to one request, whole or in chunks: `each` choices for each prompt, one behind the
    other; `prompt_tokens` are those of all prompts. `logprobs` is the form that likelihoods have, None where
    they are not wanted."""

    model: str
    chat: bool
    each: int
    prompt_tokens: int
    logprobs: Callable[[Sequence[Piece]], dict[str, Any]] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        listed = [self._choice(index, choice) for index, choice in enumerate(choices)]
        head = self._head("chat.completion" if self.chat else "text_completion")
        return head | {"choices": listed, "usage": self._usage(choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that comes before the text of choice `index`, if there is one."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        scored = [piece] if piece.likelihood is not None else []
        logprobs = self.logprobs(scored) if self.logprobs and scored else None
        if self.chat:
            delta = {"content": piece.text} if piece.text else {}
            return self._chunk(index, delta, piece.finish, logprobs)
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
        return self._head("text_completion") | {"choices": [choice]}

    def closing(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk with the usage, for clients that asked for it."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return head | {"choices": [], "usage": self._usage(choices)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Tokens read and generated; those of the prompts that were still in the cache are counted apart. A
        prompt counts once, however many choices it has."""
        generated = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(c.reused for c in choices[:: self.each])},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, index: int, delta: dict[str, str], finish: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = self.logprobs(choice.scored) if self.logprobs else None
        common = {"index": index, "logprobs": logprobs, "finish_reason": choice.finish}
        if self.chat:
            return common | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return common | {"text": choice.text}
