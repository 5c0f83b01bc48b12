"""Structured output: what a caller asks for → a grammar → which tokens may come next.

The engine is llguidance. A grammar is a text of its format; it is what crosses processes, and each
rank compiles it again. How far an answer has come is a function of its tokens alone, so that a
sequence that moves to another rank goes on there from its tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from flexpert.engine.request import StructuredOutputsParams
from flexpert.errors import RequestError

LONGEST_STRUCTURE = 2**17  # characters of a schema, an expression or a grammar
MOST_CHOICES = 4096
MOST_TAGS = 128
_MOST_SAID = 400  # characters of what the engine says
_CACHED_GRAMMARS = 128  # on a rank
_CHECKED_GRAMMARS = 64  # texts

# JSON on one line, with or without a space after comma and colon: where white space may go on, a
# model that likes it spends its tokens on nothing else.
_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}

_RESOLVED = '{"grammars":'  # how a grammar of llguidance's own format begins


def _limits() -> LLParserLimits:
    """Of one sequence: about 20 ms to build the lexer, 15 ms and 2 MiB a step, 40 MiB in all."""
    return LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)


# ---- from what was asked for to a grammar -------------------------------------------------------


def resolve(
    structure: StructuredOutputsParams, field: str = "structured_outputs"
) -> StructuredOutputsParams:
    """The same as a checked grammar that ranks can compile. Takes milliseconds; not for a loop.

    Args:
        field: what the caller calls it; errors name it.

    Raises:
        RequestError: it is malformed, uses what is not supported, nothing satisfies it, or it is
            too large.
    """
    if len(structure.kinds) != 1:
        return structure  # `SamplingParams.check` says so
    (kind,) = structure.kinds
    try:
        grammar = _GRAMMARS[kind](getattr(structure, kind))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"{field}: {_short(str(error))}", field) from None
    if not grammar.startswith(_RESOLVED):  # Lark, which would be taken for a caller's
        grammar = _RESOLVED + json.dumps([{"lark_grammar": grammar}]) + "}"
    wrong = _mistake(grammar)
    if wrong:
        raise RequestError(f"{field}: {wrong}", field)
    return StructuredOutputsParams(grammar=grammar)


@lru_cache(_CHECKED_GRAMMARS)
def _mistake(grammar: str) -> str:
    """What is wrong with a grammar; "": nothing. Kept, because clients ask for the same again."""
    wrong, said = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=_limits())
    return _explained(said[0]) if wrong else ""


def _explained(error: str) -> str:
    """What the engine says, in words for a caller."""
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    if keys:
        names = keys[1].replace('"', "'")
        return f"{names} is not supported by structured output; leave it out of the schema"
    if "oneOf constraints are not supported" in error:
        return (
            "'oneOf' is only supported where its alternatives exclude each other, for example by a "
            "'const'; use 'anyOf'"
        )
    unknown = re.match(r"Unknown format: (\S+)", error)
    if unknown:
        return f"'format' {unknown[1]!r} is not supported by structured output; use 'pattern'"
    return _short(error)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_SAID else f"{line[:_MOST_SAID]}…"


def _bounded(text: str) -> str:
    if len(text) > LONGEST_STRUCTURE:
        raise ValueError(f"has {len(text)} characters, there may be {LONGEST_STRUCTURE}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not valid Unicode: {error.reason}") from None
    return text


def _as_object(value: Mapping[str, Any] | str, what: str) -> dict[str, Any]:
    """A mapping, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(_bounded(value))
        except ValueError as error:
            raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be {what}, a JSON object")
    return value


def _json(value: dict[str, Any] | str) -> str:
    schema = _as_object(value, "a JSON Schema")
    text = _bounded(json.dumps(schema, allow_nan=False))
    return LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)  # type: ignore[arg-type]


def _json_object(_: bool) -> str:
    return _json({"type": "object"})


def _regex(value: str) -> str:
    return LLMatcher.grammar_from_regex(_bounded(value))


def _choice(value: Sequence[str]) -> str:
    if len(value) > MOST_CHOICES:
        raise ValueError(f"has {len(value)} choices, there may be {MOST_CHOICES}")
    if not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError("must be a list of texts, and not empty")
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    return LLMatcher.grammar_from_lark(_bounded(f"start: {texts}"))


def _grammar(value: str) -> str:
    if value.lstrip().startswith("{"):  # llguidance's own format has options that are ours to set
        raise ValueError("must be in Lark or GBNF")
    try:
        lark = any_to_lark(_bounded(value))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - the converter raises plain exceptions
        raise ValueError(f"is no grammar in GBNF: {error}") from None
    return LLMatcher.grammar_from_lark(lark)


def _structural_tag(value: dict[str, Any] | str) -> str:
    told = _as_object(value, "a structural tag")
    if told.get("format") is not None:
        raise ValueError("'format' is not supported in a structural tag; give structures, triggers")
    structures, triggers = told.get("structures"), told.get("triggers")
    if not isinstance(structures, list) or not 0 < len(structures) <= MOST_TAGS:
        raise ValueError(f"'structures' must be a list of 1 to {MOST_TAGS} structures")
    if not isinstance(triggers, list) or not all(isinstance(t, str) and t for t in triggers):
        raise ValueError("'triggers' must be a list of texts")
    tags = [_tag(one, triggers) for one in structures]
    grammar = StructTag.to_grammar(tags, assume_special=False)
    return LLMatcher.grammar_from_lark(_bounded(grammar))


def _tag(told: Any, triggers: list[str]) -> StructTag:
    begin = told.get("begin") if isinstance(told, dict) else None
    if not isinstance(begin, str) or not begin:
        raise ValueError("each of 'structures' needs a 'begin', a 'schema' and an 'end'")
    trigger = next((text for text in triggers if begin.startswith(text)), None)
    if trigger is None:
        raise ValueError(f"no trigger is the beginning of {begin!r}")
    schema = _as_object(told.get("schema") or {}, "a JSON Schema")
    return StructTag(
        trigger=trigger,
        begin=begin,
        grammar={**schema, "x-guidance": _JSON_OPTIONS},
        end=str(told.get("end") or ""),
    )


_GRAMMARS: Mapping[str, Callable[[Any], str]] = {
    "json": _json,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


# ---- on a rank ----------------------------------------------------------------------------------


class GrammarCache:
    """Compiled grammars of one rank; from any thread.

    tokens: gives the vocabulary, called once something is compiled. Raises: ModelError
    """

    def __init__(self, tokens: Callable[[], LLTokenizer]) -> None:
        self._tokens = tokens
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def __contains__(self, structure: StructuredOutputsParams) -> bool:
        with self._lock:
            return _key(structure) in self._compiled

    def matcher(self, structure: StructuredOutputsParams) -> LLMatcher:
        """One for a new answer; compiles the grammar if it is not there.

        Raises:
            RequestError: as `resolve`.
            ModelError: the model has no tokenizer for it.
        """
        key = _key(structure)
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
        if found is None:
            found = self._compile(structure)
            with self._lock:
                self._compiled[key] = found
                while len(self._compiled) > _CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
        return found.deep_copy()

    def _compile(self, structure: StructuredOutputsParams) -> LLMatcher:
        grammar = structure.grammar or ""
        if not grammar.startswith(_RESOLVED):
            grammar = resolve(structure).grammar or ""
        made = LLMatcher(self._tokens(), grammar, log_level=0, limits=_limits())
        if made.is_error():
            raise RequestError(f"structured_outputs: {_explained(made.get_error())}")
        return made


def _key(structure: StructuredOutputsParams) -> str:
    """Most are resolved: then it is the grammar itself."""
    if structure.grammar is not None:
        return structure.grammar
    return json.dumps(msgspec.to_builtins(structure), sort_keys=True)


class AnswerMatcher:
    """How far one structured answer has come. One thread at a time.

    fed: tokens of the answer that it knows. compiled: the engine's; None before the first
    `advance`.
    """

    __slots__ = ("_structure", "compiled", "fed")

    def __init__(self, structure: StructuredOutputsParams) -> None:
        self._structure = structure
        self.compiled: LLMatcher | None = None
        self.fed = 0

    def advance(self, tokens: list[int], grammars: GrammarCache) -> LLMatcher:
        """Feed the next tokens of the answer; what says which may follow.

        Raises:
            RequestError: they do not follow the grammar, or it has become too complex.
        """
        if self.compiled is None:
            self.compiled = grammars.matcher(self._structure)
        self.fed += len(tokens)
        if tokens and not self.compiled.consume_tokens(tokens):
            raise RequestError(self.failure())
        return self.compiled

    def failure(self) -> str:
        """Why nothing may follow."""
        said = self.compiled.get_error() if self.compiled else ""
        why = _short(said) or "no token can come next"
        return f"the answer cannot go on within its structure after {self.fed} tokens: {why}"
