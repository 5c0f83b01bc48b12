"""The fields of a body that ask for structured output: OpenAI's, vLLM's, and vLLM's older ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flexpert.engine.output_grammar import resolve
from flexpert.engine.request import STRUCTURES, StructuredOutputsParams
from flexpert.errors import RequestError

_LONGEST_NAME = 512  # characters


class JsonSchemaFormat(BaseModel):
    """`response_format.json_schema`. strict: answers follow the schema with it and without."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    name: str | None = Field(None, max_length=_LONGEST_NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's `response_format`, and vLLM's structural tags in its place."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    format: Any = None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    json_object: bool | None = None


class StructuredFields(BaseModel):
    """At most one of them asks for a structure."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structure(self) -> StructuredOutputsParams | None:
        """What the answer must be, checked; None: any text.

        Raises: RequestError
        """
        asked = [*self._of_response_format(), *self._of_structured_outputs(), *self._of_guided()]
        if not asked:
            return None
        if len(asked) > 1:
            names = " and ".join(field for field, _ in asked)
            raise RequestError(
                f"{names} cannot be combined: an answer has one structure", asked[1][0]
            )
        ((field, structure),) = asked
        return resolve(structure, field)

    @property
    def is_free(self) -> bool:
        """Answers are free text, in which only some parts have a structure."""
        told, asked = self.response_format, self.structured_outputs
        tagged = told is not None and told.type == "structural_tag"
        return tagged or (asked is not None and asked.structural_tag is not None)

    def _of_response_format(self) -> list[tuple[str, StructuredOutputsParams]]:
        told = self.response_format
        match told.type if told else "text":
            case "json_object":
                return [("response_format", StructuredOutputsParams(json_object=True))]
            case "json_schema":
                schema = told.json_schema.schema_ if told and told.json_schema else None
                if schema is None:
                    raise RequestError(
                        "response_format.json_schema.schema is missing",
                        "response_format.json_schema.schema",
                    )
                field = "response_format.json_schema.schema"
                return [(field, StructuredOutputsParams(json=schema))]
            case "structural_tag":
                tag = told.model_dump(include={"structures", "triggers", "format"}) if told else {}
                return [("response_format", StructuredOutputsParams(structural_tag=tag))]
            case _:
                return []

    def _of_structured_outputs(self) -> list[tuple[str, StructuredOutputsParams]]:
        if self.structured_outputs is None:
            return []
        given = self.structured_outputs.model_dump(by_alias=True)
        structure = StructuredOutputsParams(**given)
        if len(structure.kinds) != 1:
            told = " and ".join(structure.kinds) or "none"
            raise RequestError(
                f"structured_outputs takes exactly one of {', '.join(STRUCTURES)}; got {told}",
                "structured_outputs",
            )
        return [(f"structured_outputs.{structure.kinds[0]}", structure)]

    def _of_guided(self) -> list[tuple[str, StructuredOutputsParams]]:
        return [
            (f"guided_{kind}", StructuredOutputsParams(**{kind: value}))
            for kind in ("json", "regex", "choice", "grammar")
            if (value := getattr(self, f"guided_{kind}")) is not None
        ]
