"""JSON Schemas in the style of real APIs: orders, users, events, tickets, search filters, trees.

Made by a generator with a seed, so that a test may ask for as many as it likes and always gets the
same. Every schema can be satisfied, and uses only keywords that the service enforces.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True)
class ApiSchema:
    """bounded: no answer to it can be long, so that none may run out of tokens."""

    name: str
    schema: Schema
    bounded: bool


PATTERNS = (
    r"^[A-Z]{2}-[0-9]{4}$",
    r"^#[0-9a-f]{6}$",
    r"^(GET|POST|PUT|DELETE) /[a-z]{1,8}$",
    r"^v[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}$",
    r"^[a-z][a-z0-9_]{2,11}$",
    r"^\+[1-9][0-9]{6,11}$",
)
FORMATS = ("date", "date-time", "time", "uuid", "ipv4")
WORDS = ("id", "status", "total", "owner", "kind", "label", "size", "code", "region", "note")
ENUMS = (
    ["pending", "paid", "shipped", "cancelled"],
    ["EUR", "USD", "JPY"],
    ["low", "normal", "high", "urgent"],
    [1, 2, 3, 5, 8],
    ["red", "green", None],
    ['a"quoted" word', "grüßen", "日本"],
)


def api_schemas(count: int = 200, seed: int = 0) -> list[ApiSchema]:
    """The first `count` of the seed's schemas; the shapes take turns."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        shape, bounded = _SHAPES[number % len(_SHAPES)]
        made.append(ApiSchema(f"{shape.__name__[1:]}-{number}", shape(rng), bounded))
    return made


def _object(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


def _text(rng: random.Random) -> Schema:
    kinds: list[Callable[[], Schema]] = [
        lambda: {"type": "string", "pattern": rng.choice(PATTERNS)},
        lambda: {"type": "string", "format": rng.choice(FORMATS)},
        lambda: {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
        lambda: {"enum": rng.choice(ENUMS)},
        lambda: {"const": rng.choice(["order", "v1", 7, True, None])},
    ]
    return rng.choice(kinds)()


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-100, 100)
    kinds: list[Callable[[], Schema]] = [
        lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
        lambda: {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100},
        lambda: {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 5},
        lambda: {"type": "boolean"},
    ]
    return rng.choice(kinds)()


def _leaf(rng: random.Random) -> Schema:
    leaf = _text(rng) if rng.random() < 0.6 else _number(rng)
    if rng.random() < 0.2:
        return {"anyOf": [leaf, {"type": "null"}]}
    return leaf


def _fields(rng: random.Random, count: int) -> Schema:
    return {name: _leaf(rng) for name in rng.sample(WORDS, count)}


def _flat(rng: random.Random) -> Schema:
    return _object(_fields(rng, rng.randint(2, 5)), title="A record", description="of an API")


def _optional(rng: random.Random) -> Schema:
    properties = _fields(rng, 5)
    return _object(properties, required=list(properties)[:2])


def _nested(rng: random.Random) -> Schema:
    inner = _object({"city": _text(rng), "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})
    middle = _object({"address": inner, **_fields(rng, 2)})
    return _object({"customer": middle, "amount": _number(rng)})


def _listed(rng: random.Random) -> Schema:
    items = _object(_fields(rng, 2))
    most = rng.randint(1, 3)
    return _object({"items": {"type": "array", "items": items, "minItems": 1, "maxItems": most}})


def _tuple(rng: random.Random) -> Schema:
    return {
        "type": "array",
        "prefixItems": [_number(rng), _text(rng), {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    }


def _union(rng: random.Random) -> Schema:
    kinds = [
        _object({"type": {"const": name}, "value": _leaf(rng)}) for name in ("card", "bank", "cash")
    ]
    return _object({"payment": {"anyOf": kinds}, "paid": {"type": "boolean"}})


def _shared(rng: random.Random) -> Schema:
    money = _object(
        {
            "currency": {"enum": ["EUR", "USD"]},
            "cents": {"type": "integer", "minimum": 0, "maximum": 99999},
        }
    )
    properties = {"net": {"$ref": "#/$defs/money"}, "gross": {"$ref": "#/$defs/money"}}
    return _object({**properties, "tag": _text(rng)}, **{"$defs": {"money": money}})


def _combined(rng: random.Random) -> Schema:
    return (
        {
            "allOf": [
                {"type": "object", "properties": {"id": _number(rng)}, "required": ["id"]},
                {
                    "properties": {"kind": {"enum": ["a", "b"]}},
                    "required": ["kind"],
                    "additionalProperties": False,
                },
            ],
        }
        if rng.random() < 0
        else _object(
            {
                "id": {"allOf": [{"type": "integer"}, {"minimum": 1}, {"maximum": 9}]},
                "kind": _text(rng),
            }
        )
    )


def _several_types(rng: random.Random) -> Schema:
    return _object({"value": {"type": ["boolean", "null"]}, "level": _number(rng)})


def _map(rng: random.Random) -> Schema:
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}},
        "required": ["name"],
        "additionalProperties": _number(rng),
    }


def _free(rng: random.Random) -> Schema:
    """Texts and lists without an end, as most people write them."""
    return _object(
        {
            "title": {"type": "string"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            **_fields(rng, 1),
        }
    )


def _tree(rng: random.Random) -> Schema:
    node = _object(
        {
            "name": {"type": "string", "maxLength": 6},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        required=["name"],
    )
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def _chain(rng: random.Random) -> Schema:
    properties = {"value": _leaf(rng), "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    return _object(properties)


_SHAPES: tuple[tuple[Callable[[random.Random], Schema], bool], ...] = (
    (_flat, True),
    (_optional, True),
    (_nested, True),
    (_listed, True),
    (_tuple, True),
    (_union, True),
    (_shared, True),
    (_combined, True),
    (_several_types, True),
    (_map, False),
    (_free, False),
    (_tree, False),
    (_chain, False),
)
