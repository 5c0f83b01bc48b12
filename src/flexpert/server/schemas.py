"""Bodies that clients send.

Unknown fields are ignored, as OpenAI's servers do, but one whose neglect would change the answer
is refused. null means the default everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from flexpert.engine.request import (
    LONGEST_STOP,
    MOST_LOGPROBS,
    MOST_SAMPLES,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    MOST_TOP_K,
    SamplingParams,
)
from flexpert.frontend.request_limits import Prompt, RequestLimits
from flexpert.server.structured_fields import StructuredFields

LONGEST_NAME = 512  # characters
MOST_MESSAGES = 16_384
MOST_FIELDS = 64  # of a message: each is checked, copied and shown to the chat template
MOST_PARTS = 16_384  # of one message
MOST_RANKS = 4096  # far above any capacity, which says itself what it is


def _as_prompts(value: Any, info: ValidationInfo) -> Any:
    """str, [str, …], [int, …] or [[int, …], …] → a list of prompts."""
    message = "must be a text, a list of texts, token ids, or a list of token ids, and not empty"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(message)
    most: RequestLimits | None = info.context
    if most is not None:
        single = type(value[0]) is int
        limit = most.max_prompt_tokens if single else most.max_choices
        if len(value) > limit:
            what = "tokens" if single else "prompts"
            raise ValueError(f"has {len(value)} {what}, one request may have {limit}")
    if _are_token_ids(value):
        return [value]
    if all(isinstance(item, str) for item in value) or all(map(_are_token_ids, value)):
        return value
    raise ValueError(message)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _as_many_as_may_be(value: Any, info: ValidationInfo) -> Any:
    most: RequestLimits | None = info.context
    if isinstance(value, list) and most is not None and len(value) > most.max_prompt_tokens:
        raise ValueError(f"has {len(value)} tokens, there may be {most.max_prompt_tokens}")
    return value


def _as_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# Prompts may be long: one pass of ours instead of pydantic's over every union member.
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
Prompts = Annotated[
    Any,
    BeforeValidator(_as_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}),
]
_STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
Stops = Annotated[
    list[str] | None,
    BeforeValidator(_as_texts),
    WithJsonSchema({"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MOST_STOPS}]}),
]
Name = Annotated[str, Field(max_length=LONGEST_NAME)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    """include_usage: a last chunk with the token counts."""

    include_usage: bool = False


class Sampling(StructuredFields, _Body):
    """What both ways of generating share: OpenAI's settings and vLLM's extras."""

    model: Name | None = None
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stops = None
    max_tokens: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=-1, le=MOST_TOP_K, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    stop_token_ids: list[int] | None = Field(None, max_length=MOST_STOP_TOKENS)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)

    logit_bias: Any = None
    tools: Any = None
    functions: Any = None

    @field_validator("logit_bias", "tools", "functions")
    @classmethod
    def _unsupported(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported by this server")
        return value

    @field_validator("stream", mode="before")
    @classmethod
    def _null_is_false(cls, value: Any) -> Any:
        return False if value is None else value

    @field_validator("stream_options")
    @classmethod
    def _needs_stream(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only with stream=true")
        return value

    @property
    def include_usage(self) -> bool:
        """A last chunk carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        given: dict[str, Any] = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": self.seed,
            "stop": None if self.stop is None else tuple(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "structured_outputs": self.structure(),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("not supported by this server")
        return value

    @field_validator("best_of")
    @classmethod
    def _best_of_all(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise ValueError("only supported equal to n: every sample is returned")
        return value

    @field_validator("logprobs")
    @classmethod
    def _not_of_the_prompt(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("echo"):
            raise ValueError("not supported with echo: a prompt's log probabilities are not kept")
        return value

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        prompts: list[Prompt] = self.prompt
        return prompts

    @property
    def params(self) -> SamplingParams:
        """As the engine wants them."""
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self._params(max_tokens=max_tokens, logprobs=self.logprobs)


class ContentPart(_Body):
    """A piece of a message."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """A turn of a conversation; fields beyond these reach the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise ValueError(f"has {len(value)} fields, a message may have {MOST_FIELDS}")
        return value

    role: Name
    content: str | Annotated[list[ContentPart], Field(max_length=MOST_PARTS)] | None = None

    @field_validator("content")
    @classmethod
    def _flat(cls, value: str | list[ContentPart] | None) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if any(part.type != "text" or part.text is None for part in value):
            raise ValueError("only parts of type 'text' are supported by this server")
        return "".join(part.text or "" for part in value)


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("only with logprobs=true")
        return value

    @property
    def params(self) -> SamplingParams:
        """As the engine wants them; no limit means up to the model's context."""
        limit = self.max_completion_tokens
        return self._params(
            max_tokens=self.max_tokens if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TokenizeRequest(_Body):
    """`POST /tokenize`: a prompt, or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, max_length=MOST_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    model: Name | None = None
    # counted first: each item that is no number would be an error with its place
    tokens: Annotated[list[StrictInt], BeforeValidator(_as_many_as_may_be)]


class OperationRequest(BaseModel):
    """`POST /cluster/operations`: the number of ranks desired, or who joins and leaves."""

    # a misspelt field here would move machines
    model_config = ConfigDict(extra="forbid")

    ranks: StrictInt | None = Field(None, ge=1, le=MOST_RANKS)
    add: StrictInt = Field(0, ge=0, le=MOST_RANKS)
    remove: list[Annotated[StrictInt, Field(ge=0, le=MOST_RANKS)]] = Field(
        [], max_length=MOST_RANKS
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> OperationRequest:
        if (self.ranks is not None) == bool(self.add or self.remove):
            raise ValueError('give either {"ranks": N} or {"add": n, "remove": [ids]}')
        return self


class ElasticScaleRequest(_Body):
    """vLLM's `POST /scale_elastic_ep`; drain_timeout: seconds to wait for the change."""

    new_data_parallel_size: StrictInt = Field(gt=0, le=MOST_RANKS)
    drain_timeout: StrictInt = Field(120, gt=0, le=86_400)
