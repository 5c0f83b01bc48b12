"""What a request says of tools, and a JSON schema of the answers that it allows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import msgspec

from flexpert.errors import RequestError
from flexpert.frontend.tools.answer_parser import (
    TOOL_FAMILIES,
    AnswerParser,
    CallTags,
    ParserNames,
    ToolFamily,
)
from flexpert.frontend.tools.call_arguments import Tools
from flexpert.frontend.tools.json_calls import enforced_array, enforced_call

Choice = Literal["none", "auto", "required", "named"]


class Dialog(msgspec.Struct, frozen=True):
    """How the answers to a request are read.

    names: of the parsers. tools: name → JSON schema of the arguments; empty: nothing is called.
    choice: "named": the one function in `named` is called. strict: functions whose arguments follow
    their schema. parallel: an answer may have several calls. reasoning_open: answers begin within
    their reasoning. with_reasoning: it is shown.

    Where something has to be called, the answer is that call in JSON from its first token on,
    without reasoning and markers: `structure` has to be enforced.
    """

    names: ParserNames = ParserNames()
    tools: dict[str, dict[str, Any]] = {}
    choice: Choice = "none"
    named: str = ""
    strict: tuple[str, ...] = ()
    parallel: bool = True
    reasoning_open: bool = False
    with_reasoning: bool = True

    @property
    def calls(self) -> bool:
        """Answers may have calls."""
        return bool(self.tools) and self.choice != "none"

    @property
    def is_plain(self) -> bool:
        """Answers are content, and nothing else."""
        return not self.calls and self.names.reasoning is None

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens whose names a parser has to see."""
        if self._is_dictated:
            return frozenset()
        return ParserNames(self.names.tools if self.calls else None, self.names.reasoning).markers

    def parser(self) -> AnswerParser:
        """Of one answer."""
        return AnswerParser(
            reasoning=None if self._is_dictated else self.names.reasoning,
            tools=self._family if self.calls else None,
            reasoning_open=self.reasoning_open,
            schemas=self.tools,
            most_calls=None if self.parallel else 1,
        )

    @property
    def _family(self) -> ToolFamily | None:
        own = TOOL_FAMILIES[self.names.tools] if self.names.tools is not None else None
        if self.choice == "auto":
            return own
        grammar = enforced_call(self.named) if self.choice == "named" else enforced_array
        return ToolFamily(grammar, (), new_id=own.new_id) if own else ToolFamily(grammar, ())

    @property
    def structure(self) -> dict[str, Any] | None:
        """What structured output has to enforce, as one field of vLLM's `structured_outputs`:
        {"json": schema} or {"structural_tag": tags}; None: nothing.

        Raises: RequestError: it cannot be written as one.
        """
        if not self.calls:
            return None
        if self._is_dictated:
            schema = choice_schema(self.tools, self.choice, self.named, parallel=self.parallel)
            return {"json": schema}
        if not self.strict:
            return None
        tags = TOOL_FAMILIES[self.names.tools].tags if self.names.tools is not None else None
        if tags is None:
            raise RequestError(
                f"tools: strict is not served for the parser {self.names.tools}, but with "
                "tool_choice 'required' or a function's name",
                "tools",
            )
        return {"structural_tag": strict_tags(self.tools, self.strict, tags)}

    @property
    def _is_dictated(self) -> bool:
        return self.calls and self.choice in ("required", "named")


def opened(dialog: Dialog, prompt: str) -> Dialog:
    """The same for answers to this prompt, as the chat template wrote it."""
    if not dialog.names.opens_reasoning(prompt):
        return dialog
    return msgspec.structs.replace(dialog, reasoning_open=True)


def choice_schema(
    tools: Tools, choice: Choice, named: str = "", *, parallel: bool = True
) -> dict[str, Any] | None:
    """JSON schema of an answer whose calls `tool_choice` dictates; None: it dictates none.

    "named": the arguments of that function, alone. "required": a list of at least one object
    {"name", "parameters"}. `enforced_call` and `enforced_array` read such answers.

    Raises: RequestError: the functions' schemas do not fit together.
    """
    if choice == "named":
        return _schema_of(tools[named])
    if choice != "required":
        return None
    most = {} if parallel else {"maxItems": 1}
    return {
        "type": "array",
        "minItems": 1,
        **most,
        "items": {"anyOf": [_call(name, _schema_of(schema)) for name, schema in tools.items()]},
        **_definitions(tools.values()),
    }


def strict_tags(tools: Tools, strict: Collection[str], tags: CallTags) -> dict[str, Any]:
    """A structural tag: free text, in which calls are what the schemas of the strict functions say;
    other functions get any object."""
    structures = [
        {
            "begin": tags.begin.format(name=name),
            "schema": _schema_of(schema) if name in strict else {"type": "object"},
            "end": tags.end,
        }
        for name, schema in tools.items()
    ]
    return {"type": "structural_tag", "triggers": [tags.trigger], "structures": structures}


def _call(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    inner = {key: value for key, value in schema.items() if key not in ("$defs", "definitions")}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": inner},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _schema_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A function without a schema takes nothing."""
    return dict(schema) or {"type": "object", "properties": {}, "additionalProperties": False}


def _definitions(schemas: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """References are from the root: what they name moves there.

    Raises: RequestError: two functions mean different things by one name.
    """
    found: dict[str, dict[str, Any]] = {}
    for schema in schemas:
        for group in ("$defs", "definitions"):
            for name, meaning in (schema.get(group) or {}).items():
                known = found.setdefault(group, {}).setdefault(name, meaning)
                if known != meaning:
                    raise RequestError(
                        f"tools: {group}/{name} means different things in two functions; give "
                        "it two names",
                        "tools",
                    )
    return found
