"""Arguments of a call: JSON as a model writes it, or made of the texts between its tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexpert.frontend.tools.call_reader import CallReader, Reading
from flexpert.frontend.tools.tool_events import AnswerSink

Schema = Mapping[str, Any]
Tools = Mapping[str, Schema]
"""Name of a function → JSON schema of its arguments."""

_MOST_DEPTH = 8  # of references and alternatives in a schema
_KINDS: Mapping[type, tuple[str, ...]] = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    list: ("array",),
    dict: ("object",),
    type(None): ("null",),
}


def written_json(
    reader: CallReader, sink: AnswerSink, ends: Sequence[str], fences: Sequence[str] = ()
) -> Reading[str | None]:
    """Arguments in JSON up to one of `ends`, which is read and returned; whatever else is written
    there is part of them, but for white space around, and `fences` behind them."""
    yield from reader.space()
    emitted: list[bool] = []

    def emit(text: str) -> None:
        emitted.append(True)
        sink.arguments(text)

    whole = yield from reader.json_value(emit)
    if not whole:
        end = yield from reader.until(ends, emit)
        if not emitted:
            sink.arguments("{}")
        return end
    rest, end = yield from reader.take(ends)
    rest = rest.strip()
    for fence in fences:
        rest = rest.removesuffix(fence).rstrip()
    sink.arguments(rest)
    return end


class TaggedArguments:
    """JSON of arguments whose values are written as texts between tags.

    Args:
        schema: of the arguments, which tells texts from other values.
    """

    def __init__(self, schema: Schema, sink: AnswerSink) -> None:
        self._schema = schema
        self._sink = sink
        self._begun = False

    def value(
        self, key: str, reader: CallReader, ends: Sequence[str], *, is_text: bool | None = None
    ) -> Reading[str | None]:
        """Read one up to one of `ends`, which is returned. A line break before it and one behind
        it are layout. A text is handed on as it comes; what is cut off stays open. is_text: as the
        model says; None: it does not, and the schema has to."""
        self._sink.arguments(("," if self._begun else "{") + f"{_dumped(key)}:")
        self._begun = True
        wanted = parameter_schema(self._schema, key)
        if is_text is None:
            is_text = kinds_of(wanted, self._schema) <= {"string"}
        if is_text:
            return (yield from self._text(reader, ends))
        text, end = yield from reader.take(ends)
        text = text.removeprefix("\n").removesuffix("\n")
        self._sink.arguments(text if end is None else valued(text, wanted, self._schema))
        return end

    def _text(self, reader: CallReader, ends: Sequence[str]) -> Reading[str | None]:
        yield from reader.literal("\n")
        self._sink.arguments('"')
        held = ""

        def emit(text: str) -> None:
            nonlocal held
            text = held + text
            held = "\n" if text.endswith("\n") else ""
            self._sink.arguments(_dumped(text.removesuffix("\n"))[1:-1])

        end = yield from reader.until(ends, emit)
        if end is not None:
            self._sink.arguments('"')
        return end

    def close(self) -> None:
        """There are no more."""
        self._sink.arguments("}" if self._begun else "{}")


def parameter_schema(schema: Schema, key: str) -> object:
    """Of one parameter; None where nothing is said of it."""
    properties = schema.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def kinds_of(schema: object, root: Schema, depth: int = 0) -> set[str]:
    """Types that a schema allows, as JSON schema names them; empty: it does not say."""
    if not isinstance(schema, Mapping) or depth > _MOST_DEPTH:
        return set()
    found: set[str] = set()
    kind = schema.get("type")
    if isinstance(kind, str):
        found.add(kind)
    elif isinstance(kind, list):
        found.update(one for one in kind if isinstance(one, str))
    values = schema["enum"] if isinstance(schema.get("enum"), list) else []
    values = [*values, schema["const"]] if "const" in schema else values
    if not found:
        for value in values:
            found.update(_KINDS.get(type(value), ()))
    for name in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(name)
        for part in parts if isinstance(parts, list) else ():
            found |= kinds_of(part, root, depth + 1)
    if isinstance(reference := schema.get("$ref"), str):
        found |= kinds_of(_resolved(reference, root), root, depth + 1)
    return found


def valued(text: str, schema: object, root: Schema) -> str:
    """JSON of the value that a text stands for: of a type that is allowed, else the text."""
    kinds = kinds_of(schema, root)
    for reading in _READINGS:
        try:
            value = reading(text)
        except (ValueError, RecursionError):
            continue
        if not kinds or kinds.intersection(_KINDS.get(type(value), ())):
            return text.strip() if reading is _strict_json else _dumped(value)
    return _dumped(text)


def _literal_word(text: str) -> bool | None:
    """Python's True, False and None, which models write, too. Raises: ValueError"""
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        return words[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def _strict_json(text: str) -> Any:
    """Raises: ValueError"""

    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity are no JSON

    return json.loads(text, parse_constant=refuse)


_READINGS: tuple[Callable[[str], Any], ...] = (_strict_json, _literal_word)


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _resolved(reference: str, root: Schema) -> object:
    place: object = root
    for step in reference.removeprefix("#/").split("/"):
        if not isinstance(place, Mapping):
            return None
        place = place.get(step)
    return place
