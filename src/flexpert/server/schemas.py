"""Bodies that clients send.

What is here is served; any other field is refused by name, see `fields`. null means the default
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from flexpert.engine.request import (
    LONGEST_SALT,
    LONGEST_STOP,
    MOST_BAD_WORDS,
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_SAMPLES,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    MOST_TOP_K,
    SamplingParams,
)
from flexpert.errors import RequestError
from flexpert.frontend.request_limits import Prompt, RequestLimits
from flexpert.frontend.text import ChatOptions
from flexpert.server.structured_fields import StructuredFields
from flexpert.server.tool_fields import ToolFields

LONGEST_NAME = 512  # characters
MOST_MESSAGES = 16_384
MOST_FIELDS = 64  # of a message: each is checked, copied and shown to the chat template
MOST_PARTS = 16_384  # of one message
MOST_DOCUMENTS = 16_384
MOST_REQUEST_ID = 256  # characters
LONGEST_TEMPLATE = 2**18  # characters
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
# counted first: each item that is no number would be an error with its place
TokenIds = Annotated[list[StrictInt], BeforeValidator(_as_many_as_may_be)]
_TOKEN = re.compile(r"[0-9]{1,10}")


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer has besides its text.

    usage: a last chunk with the token counts. continuous_usage: each chunk has them so far.
    token_ids: of prompt and answer. tokens_as_ids: log probabilities name tokens by their ids.
    prompt_logprobs, echo_logprobs: of the prompt's tokens, and of so many of the likeliest at each
    place; in vLLM's shape, and in OpenAI's with the answer's; None: none.
    """

    usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    prompt_logprobs: int | None = None
    echo_logprobs: int | None = None


class _Body(BaseModel):
    # kept, so that `fields` finds and refuses them
    model_config = ConfigDict(
        extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )


class StreamOptions(_Body):
    """include_usage: a last chunk with the token counts. continuous_usage_stats: in every chunk.
    include_obfuscation: OpenAI's padding of chunks, which are never padded here."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


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
    logit_bias: dict[str, float] | None = Field(None, max_length=MOST_BIASES)
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = Field(None, max_length=MOST_BAD_WORDS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="the last so many are kept; -1: as many as the context takes"
    )
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = Field(
        None, description="no tokenizer here puts spaces there, whatever it says"
    )
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=LONGEST_SALT)
    request_id: (
        Annotated[str, Field(max_length=MOST_REQUEST_ID, pattern=r"^[\x21-\x7e]+$")] | None
    ) = None
    priority: int | None = Field(
        None, gt=-(2**31), lt=2**31, description="lower ones are computed earlier"
    )
    # By their definition these do not change an answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("must be at least 1, or -1 for as many as the context takes")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in value or {} if not _TOKEN.fullmatch(key)), None)
        if wrong is not None:
            raise ValueError(f"names tokens by their ids; {wrong[:40]!r} is none")
        return value

    @model_validator(mode="after")
    def _at_once(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs are not given with stream=true, as in vLLM", "prompt_logprobs"
            )
        return self

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
    def shown(self) -> Shown:
        """What the answer has besides its text."""
        options = self.stream_options or StreamOptions()
        return Shown(
            usage=options.include_usage,
            continuous_usage=options.include_usage and options.continuous_usage_stats,
            token_ids=bool(self.return_token_ids),
            tokens_as_ids=bool(self.return_tokens_as_token_ids),
            prompt_logprobs=self.prompt_logprobs,
        )

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """As the engine wants them. defaults: of the model, where nothing is asked for."""
        raise NotImplementedError

    def _params(
        self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
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
            "prompt_logprobs": self.prompt_logprobs,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
            "structured_outputs": self.structure(),
        }
        if self.logit_bias is not None:
            given["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        for name in ("allowed_token_ids", "bad_words"):
            value = getattr(self, name)
            given[name] = None if value is None else tuple(value)
        given = {name: value for name, value in given.items() if value is not None}
        own = {name: value for name, value in defaults.items() if name != "max_tokens"}
        return SamplingParams(**own | given | {"max_tokens": max_tokens, "logprobs": logprobs})


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, description="0: the prompt alone, with echo")
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

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens: 0 only with echo or prompt_logprobs: there is nothing to answer with",
                "max_tokens",
            )
        return self

    @property
    def shown(self) -> Shown:
        """What the answer has besides its text."""
        echoed = self.logprobs if self.echo else None
        return msgspec.structs.replace(super().shown, echo_logprobs=echoed)

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        prompts: list[Prompt] = self.prompt
        return prompts

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """As the engine wants them; without an answer there is a token that nobody sees."""
        max_tokens = 16 if self.max_tokens is None else max(self.max_tokens, 1)
        params = self._params(defaults, max_tokens=max_tokens, logprobs=self.logprobs)
        if self.echo and self.logprobs is not None:
            most = max(self.logprobs, self.prompt_logprobs or 0)
            params = msgspec.structs.replace(params, prompt_logprobs=most)
        return params


class ContentPart(_Body):
    """A piece of a message. cache_control: Anthropic's; every prefix is cached."""

    type: str
    text: str | None = None
    cache_control: Any = None


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
        odd = {name for part in value for name, told in (part.model_extra or {}).items() if told}
        if odd:  # the template gets the text alone
            raise ValueError(f"a part of it has {min(odd)[:80]!r}, which is not known here")
        return "".join(part.text or "" for part in value)


Template = Annotated[str, Field(max_length=LONGEST_TEMPLATE), WithJsonSchema({"type": "string"})]

Documents = Annotated[
    list[dict[str, Any]],
    Field(max_length=MOST_DOCUMENTS),
    WithJsonSchema({"type": "array", "items": {"type": "object"}}),
]


class Templated(_Body):
    """What the chat template is given besides the messages, with vLLM's names."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Template | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MOST_FIELDS)
    documents: Documents | None = None
    reasoning_effort: Name | None = None

    @field_validator("chat_template")
    @classmethod
    def _trusted(cls, value: str | None, info: ValidationInfo) -> str | None:
        limits: RequestLimits | None = info.context
        if value is not None and limits is not None and not limits.trust_chat_template:
            raise ValueError(
                "a request's own template is a program that runs here; this server takes none "
                "(--trust-request-chat-template)"
            )
        return value

    @property
    def options(self) -> ChatOptions:
        """For `TokenText.render`.

        Raises: RequestError: they contradict each other.
        """
        continues = bool(self.continue_final_message)
        begins = not continues if self.add_generation_prompt is None else self.add_generation_prompt
        if begins and continues:
            raise RequestError(
                "continue_final_message goes with add_generation_prompt=false: either the last "
                "message goes on, or a new one begins",
                "continue_final_message",
            )
        return ChatOptions(
            add_generation_prompt=begins,
            continue_final_message=continues,
            chat_template=self.chat_template,
            documents=self.documents,
            reasoning_effort=self.reasoning_effort,
            kwargs=self.chat_template_kwargs or {},
        )


class ChatRequest(Sampling, Templated, ToolFields):
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

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """As the engine wants them; no limit means up to the model's context."""
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        return self._params(
            defaults,
            max_tokens=defaults.get("max_tokens") if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class TokenizeRequest(Templated):
    """`POST /tokenize`: a prompt, or messages."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, max_length=MOST_MESSAGES)
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        given = [name for name in Templated.model_fields if getattr(self, name) is not None]
        if self.prompt is not None and given:
            raise RequestError(f"{given[0]} goes with messages, not with a prompt", given[0])
        return self


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: TokenIds


OperationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]


class OperationRequest(BaseModel):
    """`POST /cluster/operations`: the number of ranks desired, or who joins and leaves; or that
    experts move between the ranks that there are, as their load asks for.

    operation_id: the caller's own; asked for again, it is the same operation. dry_run: nothing
    begins; the answer says what would move.
    """

    # a misspelt field here would move machines
    model_config = ConfigDict(extra="forbid")

    ranks: StrictInt | None = Field(None, ge=1, le=MOST_RANKS)
    add: StrictInt = Field(0, ge=0, le=MOST_RANKS)
    remove: list[Annotated[StrictInt, Field(ge=0, le=MOST_RANKS)]] = Field(
        [], max_length=MOST_RANKS
    )
    rebalance: bool = False
    operation_id: OperationId | None = None
    dry_run: StrictBool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> OperationRequest:
        ways = (self.ranks is not None, bool(self.add or self.remove), self.rebalance)
        if sum(ways) != 1:
            raise ValueError(
                'give one of {"ranks": N}, {"add": n, "remove": [ids]} and {"rebalance": true}'
            )
        return self


class ElasticScaleRequest(_Body):
    """`POST /scale_elastic_ep`: vLLM names the number of ranks new_data_parallel_size, SGLang
    new_ep_size. drain_timeout: seconds to wait for the change."""

    new_data_parallel_size: StrictInt | None = Field(None, gt=0, le=MOST_RANKS)
    new_ep_size: StrictInt | None = Field(None, gt=0, le=MOST_RANKS)
    drain_timeout: StrictInt = Field(120, gt=0, le=86_400)
    operation_id: OperationId | None = None

    @model_validator(mode="after")
    def _one_size(self) -> ElasticScaleRequest:
        if len({self.new_data_parallel_size, self.new_ep_size} - {None}) != 1:
            raise ValueError('give {"new_data_parallel_size": N} or {"new_ep_size": N}')
        return self

    @property
    def size(self) -> int:
        """The number of ranks that is asked for."""
        return self.new_data_parallel_size or self.new_ep_size or 0
