"""What a caller asks for and what a rank answers: plain data that crosses processes."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from typing import Any

import msgspec

from flexpert.errors import ContextOverflow, RequestError, context_limit

FINISH_STOP = "stop"
FINISH_LENGTH = "length"

MOST_TOP_K = 2**31 - 1  # a larger one than the vocabulary is as good as off
MOST_SAMPLES = 128
MOST_STOPS = 16
LONGEST_STOP = 512  # characters: each token is compared with as much of what came before it
MOST_STOP_TOKENS = 1024
MOST_LOGPROBS = 20
MOST_BIASES = 1024
MOST_BAD_WORDS = 256
LONGEST_BAD_WORD = 64  # tokens: each is compared with the end of the answer at every step
LONGEST_SALT = 256


STRUCTURES = ("json", "regex", "choice", "grammar", "structural_tag", "json_object")


class StructuredOutputsParams(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """What an answer must be, as in vLLM; exactly one of these.

    json: a JSON Schema, as a mapping or as its text. json_object: any JSON object.
    regex: a regular expression for the whole answer. choice: one of these texts.
    grammar: Lark or GBNF (`start` or `root` is the whole answer).
    structural_tag: {"structures": [{"begin", "schema", "end"}], "triggers": [...]}: free text in
        which what follows a trigger is one of the structures; as a mapping or as its text.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    json_object: bool | None = None

    @property
    def kinds(self) -> list[str]:
        """Names of those that were given."""
        return [name for name in STRUCTURES if getattr(self, name) not in (None, False)]


# vLLM's names of what there is not here → why, or what to use
_NOT_HERE = {
    "use_beam_search": "beam search is not served",
    "beam_width": "beam search is not served",
    "length_penalty": "beam search is not served",
    "early_stopping": "beam search is not served",
    "best_of": "all n samples are returned: n",
    "logits_processors": "there are logit_bias, allowed_token_ids and bad_words",
    "output_kind": "AsyncLLM yields all there is so far, LLM whole answers",
    "detokenize": "a service without a tokenizer gives token ids only: model.skip_tokenizer_init",
}


class _Named(msgspec.StructMeta):
    """Makes a struct whose constructor says which name was probably meant."""

    def __call__(cls, *args: Any, **given: Any) -> Any:  # noqa: N805 - of a metaclass
        known = cls.__struct_fields__
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                advice = _NOT_HERE.get(name) or (f"did you mean {near[0]!r}?" if near else "")
                told = f": {advice}" if advice else ""
                raise TypeError(f"{cls.__name__} has no {name!r}{told}")
        return super().__call__(*args, **given)


class _NamedStruct(msgspec.Struct, frozen=True, metaclass=_Named):
    pass


class SamplingParams(_NamedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen; names and meanings as in vLLM and OpenAI.

    Where a tuple is named, a list will do; `stop` may be one text, and -1 turns top_k off, too.

    max_tokens: None = up to the model's context.
    temperature: 0 = greedy.
    top_k: 0 = off. top_p: 1 = off. min_p: 0 = off, relative to the most likely token.
    repetition_penalty: over prompt and answer (Keskar et al. 2019), 1 = off.
    presence_penalty, frequency_penalty: over the answer (OpenAI), 0 = off.
    seed: None = drawn by the head. Sample i of n uses seed + i.
    stop: texts that end the answer (not included). stop_token_ids: tokens that do.
    ignore_eos: do not stop at the model's end-of-sequence tokens.
    min_tokens: end-of-sequence and stop tokens are impossible before.
    logprobs: None = none; m = the chosen token's and the m most likely ones', at most 20.
    prompt_logprobs: the same of the prompt's tokens; the prefix cache is not read then.
    logit_bias: token → what is added to its logit (OpenAI), -100 to 100.
    allowed_token_ids: no other token is possible; None = all.
    bad_token_ids: sequences of tokens whose last is impossible after the others.
    bad_words: texts that the answer must not have; whoever has a tokenizer makes bad_token_ids of
        them.
    include_stop_str_in_output: the stop text that was met is part of the answer.
    skip_special_tokens: special tokens have no text.
    cache_salt: only sequences with the same one share cached prefixes.
    priority: on its rank a sequence with a lower number is admitted earlier, and gives its blocks
        up later; of equals the one that came first.
    structured_outputs: what the answer must be; tokens that lead away from it are impossible.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = ""
    priority: int = 0
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """What vLLM takes besides, as ours; `check` says what is wrong with anything else."""
        stop: object = self.stop
        if stop is None or isinstance(stop, str):
            self._set("stop", () if stop is None else (stop,))
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            if isinstance(value := getattr(self, name), list):
                self._set(name, tuple(value))
        if self.top_k == -1:
            self._set("top_k", 0)

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    def check(self) -> None:
        """Raises RequestError naming the first value of a wrong type or out of its range."""
        try:
            msgspec.convert(msgspec.to_builtins(self), SamplingParams)
        except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(f"a sampling parameter is of a wrong type: {error}") from None
        checks = [
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "must be between 0 and 100"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", 0 <= self.top_k <= MOST_TOP_K, f"must be 0 (off) to {MOST_TOP_K}"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "must be in (0, 100]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "must be between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "must be between -2 and 2"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "must fit into 64 bits"),
            ("n", 1 <= self.n <= MOST_SAMPLES, f"must be between 1 and {MOST_SAMPLES}"),
            (
                "stop",
                len(self.stop) <= MOST_STOPS
                and all(0 < len(text) <= LONGEST_STOP for text in self.stop),
                f"takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MOST_STOP_TOKENS,
                f"takes at most {MOST_STOP_TOKENS} tokens",
            ),
            ("min_tokens", self.min_tokens >= 0, "must not be negative"),
            (
                "min_tokens",
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                "must not exceed max_tokens",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"must be 0 to {MOST_LOGPROBS}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MOST_LOGPROBS,
                f"must be 0 to {MOST_LOGPROBS}",
            ),
            (
                "logit_bias",
                len(self.logit_bias) <= MOST_BIASES
                and all(-100 <= bias <= 100 for bias in self.logit_bias.values()),
                f"takes at most {MOST_BIASES} tokens, each with -100 to 100",
            ),
            ("allowed_token_ids", self.allowed_token_ids != (), "must not be empty"),
            (
                "bad_words",
                len(self.bad_words) <= MOST_BAD_WORDS
                and len(self.bad_token_ids) <= 2 * MOST_BAD_WORDS
                and all(0 < len(text) <= LONGEST_STOP for text in self.bad_words)
                and all(0 < len(ids) <= LONGEST_BAD_WORD for ids in self.bad_token_ids),
                f"takes at most {MOST_BAD_WORDS} texts of 1 to {LONGEST_BAD_WORD} tokens",
            ),
            ("priority", abs(self.priority) < 2**31, "must fit into 32 bits"),
            (
                "cache_salt",
                len(self.cache_salt) <= LONGEST_SALT,
                f"must have at most {LONGEST_SALT} characters",
            ),
        ]
        for name, holds, message in checks:
            if not holds:
                raise RequestError(f"{name} {message}", name)
        if self.structured_outputs is not None:
            self._check_structure(self.structured_outputs)

    def _check_structure(self, structure: StructuredOutputsParams) -> None:
        """Raises RequestError: not exactly one structure, or what it cannot be combined with."""
        if len(structure.kinds) != 1:
            given = " and ".join(structure.kinds) or "none"
            raise RequestError(
                f"structured_outputs takes exactly one of {', '.join(STRUCTURES)}; got {given}",
                "structured_outputs",
            )
        ends = "an answer that is complete must end"
        stuck = "there could be no token left to go on with"
        reasons = {"ignore_eos": ends, "min_tokens": ends}
        reasons |= {"allowed_token_ids": stuck, "bad_words": stuck, "bad_token_ids": stuck}
        for name, why in reasons.items():
            if getattr(self, name):
                raise RequestError(f"{name} cannot be combined with structured output: {why}", name)

    def check_model(self, vocab: int, max_model_len: int) -> None:
        """Raises RequestError, ContextOverflow naming what a model of this size cannot do."""
        named: dict[str, Iterable[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": itertools.chain.from_iterable(self.bad_token_ids),
        }
        for name, tokens in named.items():
            wrong = next((token for token in tokens if not 0 <= token < vocab), None)
            if wrong is not None:
                raise RequestError(f"{name}: {wrong} is outside the vocabulary of {vocab}", name)
        for name, count in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if count is not None and count >= max_model_len:
                raise ContextOverflow(
                    f"{context_limit(max_model_len)}. However, {name} is {count}, and the prompt "
                    "has at least one token. Lower it.",
                    name,
                )


class RequestSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence as a rank receives it: also everything needed to go on elsewhere.

    prompt: token ids of the prompt. generated: token ids already published (a resumed sequence).
    params: with max_tokens and seed resolved to numbers, n = 1; `stop` texts are the head's work.
    eos: the model's end tokens; empty with ignore_eos. on_trial: it may be what ends ranks.
    """

    id: str
    prompt: list[int]
    generated: list[int]
    params: SamplingParams
    eos: tuple[int, ...]
    on_trial: bool = False


class HeldKV(msgspec.Struct, frozen=True, array_like=True):
    """What a rank holds of a sequence: keys and values of its first tokens, in its KV blocks.

    computed: how many tokens. blocks: those that hold them, in order. state: the slot of its states
    behind them, of a model whose layers keep one; -1: none.
    """

    id: str
    computed: int
    blocks: list[int]
    state: int = -1


class KVMigration(msgspec.Struct, frozen=True, array_like=True):
    """A sequence on its way to another rank, and what the one it comes from holds of it."""

    sequence: RequestSequence
    held: HeldKV


class CachedBlock(msgspec.Struct, frozen=True, array_like=True):
    """A KV block that no sequence holds, and that a prompt may begin with. digest: 32 bytes, see
    `engine.blocks.block_digest`."""

    digest: bytes
    block: int


class BlockChanges(msgspec.Struct, frozen=True, array_like=True):
    """Keys (`block_keys`) of blocks that can be found in a prefix cache since the last report, and
    of those that no longer can."""

    added: bytes = b""
    removed: bytes = b""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of one position, natural logarithm, before temperature and penalties.

    rank: of the chosen token, 1 for the likeliest.
    """

    chosen: float
    top_ids: list[int]
    top: list[float]
    rank: int = 0


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one sequence, published by a rank after a whole step.

    position: index in the answer of tokens[0]; the head refuses what is not the next one.
    finish: None while it goes on, else "stop" or "length".
    degraded: they, or what they follow, were computed while experts were missing.
    prompt_logprobs: with the first token, if asked for: of the prompt's tokens from the second on.
    cached: with the first token: how many of the prompt's were found in the prefix cache.
    waited: with the first token: seconds until its rank had room for it.
    """

    id: str
    position: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: str | None
    degraded: bool = False
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached: int = 0
    waited: float = 0.0
