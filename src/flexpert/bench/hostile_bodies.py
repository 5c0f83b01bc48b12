"""Bodies that nobody should send: by kind, and up to a size."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")

NUMBERS: tuple[Any, ...] = (-1, 0, 1, 1.5, 2**31, 2**63, 2**64, 2**70, -(2**63), -(2**70))
NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e400")
TEXTS = ("", "\0", "a\0b", "\ud800", "x\udfffy", "\U0010ffff", "é" * 1000, "x" * 2**20)
OTHERS: tuple[Any, ...] = (None, True, [], {}, [[]], [None], "1", ["x"], [1, "x"], {"a": {"b": []}})

INTEGERS = (
    "n",
    "max_tokens",
    "max_completion_tokens",
    "top_k",
    "seed",
    "min_tokens",
    "logprobs",
    "top_logprobs",
    "best_of",
)
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
LISTS = ("stop", "stop_token_ids", "prompt", "tokens", "messages")
STRINGS = ("model", "prompt", "stop", "suffix", "user", "role", "content")
FLAGS = ("stream", "echo", "ignore_eos", "stream_options", "add_special_tokens")
FIELDS = tuple(dict.fromkeys((*INTEGERS, *FLOATS, *LISTS, *STRINGS, *FLAGS)))


def base(path: str) -> dict[str, Any]:
    """A body that is right."""
    match path:
        case "/v1/completions":
            return {"prompt": "hi", "max_tokens": 4}
        case "/v1/chat/completions":
            return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        case "/detokenize":
            return {"tokens": [1, 2]}
    return {"prompt": "hi"}


def with_field(path: str, name: str, value: Any) -> bytes:
    """A body that is right but for one field; role and content are a message's."""
    body = base(path)
    if name in ("role", "content"):
        body["messages"] = [{"role": "user", "content": "hi"} | {name: value}]
    else:
        body[name] = value
    return json.dumps(body).encode()


def not_finite(path: str, name: str, literal: str) -> bytes:
    """As JSON's grammar forbids and Python's parser takes it."""
    return with_field(path, name, "@").replace(b'"@"', literal.encode())


def each_field() -> Iterator[tuple[str, bytes]]:
    """Every field at every odd value."""
    for path in PATHS:
        for name in FIELDS:
            for value in (*NUMBERS, *TEXTS, *OTHERS, [2**63], [2**70], [-1]):
                yield path, with_field(path, name, value)
            for literal in NOT_FINITE:
                yield path, not_finite(path, name, literal)


Heavy = Callable[[int], bytes]


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


# Each takes the size in bytes that it may have.
HEAVY: dict[str, tuple[str, Heavy]] = {
    "many prompts": ("/v1/completions", lambda n: _json({"prompt": ["a"] * (n // 5)})),
    "many prompts of one token": ("/v1/completions", lambda n: _json({"prompt": [[1]] * (n // 5)})),
    "many samples": ("/v1/completions", lambda n: _json({"prompt": ["a"] * (n // 99), "n": 128})),
    "many tokens": ("/v1/completions", lambda n: _json({"prompt": [1] * (n // 3)})),
    "a long text": ("/v1/completions", lambda n: _json({"prompt": "x " * (n // 2)})),
    "one long word": ("/v1/completions", lambda n: _json({"prompt": "x" * n})),
    "escapes": ("/v1/completions", lambda n: b'{"prompt":"' + b"\\u00e9" * (n // 6) + b'"}'),
    "long numbers": ("/v1/completions", lambda n: b'{"prompt":[' + b"9" * n + b"]}"),
    "many stop texts": (
        "/v1/completions",
        lambda n: _json({"prompt": "a", "stop": ["b"] * (n // 5)}),
    ),
    "many stop tokens": (
        "/v1/completions",
        lambda n: _json({"prompt": "a", "stop_token_ids": [1] * (n // 3)}),
    ),
    "a long model": ("/v1/completions", lambda n: _json({"prompt": "a", "model": "m" * n})),
    "many fields": (
        "/v1/completions",
        lambda n: _json({"prompt": "a"} | {f"f{i}": i for i in range(n // 24)}),
    ),
    "echoes": (
        "/v1/completions",
        lambda n: _json({"prompt": ["ab" * 40] * (n // 84), "echo": True}),
    ),
    "many fields of a message": (
        "/v1/chat/completions",
        lambda n: _json(
            {"messages": [{"role": "user", "content": "a"} | {f"f{i}": i for i in range(n // 16)}]}
        ),
    ),
    "many messages": (
        "/v1/chat/completions",
        lambda n: _json({"messages": [{"role": "user", "content": "a"}] * (n // 34)}),
    ),
    "a long chat": (
        "/v1/chat/completions",
        lambda n: _json({"messages": [{"role": "user", "content": "a word " * (n // 7)}]}),
    ),
    "many parts": (
        "/v1/chat/completions",
        lambda n: _json(
            {"messages": [{"role": "u", "content": [{"type": "text", "text": "a"}] * (n // 31)}]}
        ),
    ),
    "messages with many other fields": (
        "/v1/chat/completions",
        lambda n: _json({"messages": [{"role": "user", "content": "a", "x": [0] * (n // 3)}]}),
    ),
    "a text to tokenise": ("/tokenize", lambda n: _json({"prompt": "a b" * (n // 3)})),
    "tokens to put together": ("/detokenize", lambda n: _json({"tokens": [7] * (n // 3)})),
    "nested lists": ("/v1/completions", lambda n: b"[" * n),
    "nested objects": ("/v1/completions", lambda n: b'{"a":' * (n // 5)),
    "no JSON": ("/v1/completions", lambda n: b"\xff" * n),
    "nothing": ("/v1/completions", lambda n: b" " * n),
}


def heavy(seed: int, size: int) -> Iterator[tuple[str, bytes]]:
    """Without end: heavy bodies of up to this size, drawn."""
    draw = random.Random(seed)
    kinds = list(HEAVY.values())
    while True:
        path, make = draw.choice(kinds)
        yield path, make(int(size ** draw.uniform(0.7, 1.0)))
