"""What a caller asks for and what a rank answers: plain data that crosses processes."""

from __future__ import annotations

import msgspec

from flexpert.errors import RequestError

FINISH_STOP = "stop"
FINISH_LENGTH = "length"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen; names and meanings as in vLLM and OpenAI.

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

    def check(self) -> None:
        """Raises RequestError naming the first value out of its range."""
        checks = [
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0 <= self.temperature <= 100, "temperature must be between 0 and 100"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 (off) or positive"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (0 < self.repetition_penalty <= 100, "repetition_penalty must be in (0, 100]"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
            (self.seed is None or -(2**63) <= self.seed < 2**63, "seed must fit into 64 bits"),
            (1 <= self.n <= 128, "n must be between 1 and 128"),
            (len(self.stop) <= 16 and all(self.stop), "stop takes at most 16 non-empty texts"),
            (self.min_tokens >= 0, "min_tokens must not be negative"),
            (
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                "min_tokens must not exceed max_tokens",
            ),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must be 0 to 20"),
        ]
        for holds, message in checks:
            if not holds:
                raise RequestError(message)


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence as a rank receives it: also everything needed to go on elsewhere.

    prompt: token ids of the prompt. generated: token ids already published (a resumed sequence).
    params: with max_tokens and seed resolved to numbers, n = 1; `stop` texts are the head's work.
    eos: the model's end tokens; empty with ignore_eos.
    """

    id: str
    prompt: list[int]
    generated: list[int]
    params: SamplingParams
    eos: tuple[int, ...]


class HeldKV(msgspec.Struct, frozen=True, array_like=True):
    """What a rank holds of a sequence: keys and values of its first tokens, in its KV blocks.

    computed: how many tokens. blocks: those that hold them, in order.
    """

    id: str
    computed: int
    blocks: list[int]


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A sequence on its way to another rank, and what the one it comes from holds of it."""

    sequence: Sequence
    held: HeldKV


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of one position, natural logarithm, before temperature and penalties."""

    chosen: float
    top_ids: list[int]
    top: list[float]


class TokenEvent(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one sequence, published by a rank after a whole step.

    position: index in the answer of tokens[0]; the head refuses what is not the next one.
    finish: None while it goes on, else "stop" or "length".
    degraded: they, or what they follow, were computed while experts were missing.
    """

    id: str
    position: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: str | None
    degraded: bool = False
