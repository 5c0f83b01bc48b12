"""The fields of a chat that are about tools and reasoning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from flexpert.errors import RequestError
from flexpert.frontend.tools.answer_parser import ParserNames
from flexpert.frontend.tools.tool_choice import Choice, Dialog

MOST_TOOLS = 1024
_LONGEST_DESCRIPTION = 2**18  # characters


def counted(most: int) -> BeforeValidator:
    """At most so many items or characters, counted before any is looked at. It is not in the API's
    description: who makes requests from that would make such long ones."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict | str) and len(value) > most:
            what = "characters" if isinstance(value, str) else "items"
            raise ValueError(f"has {len(value)} {what}, it may have {most}")
        return value

    return BeforeValidator(check)


FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ToolFunction(_Strict):
    """A function that may be called. parameters: a JSON schema of an object."""

    name: FunctionName
    description: Annotated[str, counted(_LONGEST_DESCRIPTION)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Strict):
    """The one type of tool that is served."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(_Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(_Strict):
    """The function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(_Strict):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], counted(MOST_TOOLS)] = Field(min_length=1)


class AllowedToolChoice(_Strict):
    """OpenAI's way to choose among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ToolFields(BaseModel):
    """What may be called, and what is shown of the reasoning."""

    tools: Annotated[list[FunctionTool], counted(MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @field_validator("tools")
    @classmethod
    def _one_of_each_name(cls, value: list[FunctionTool] | None) -> list[FunctionTool] | None:
        names = [tool.function.name for tool in value or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} is there twice")
        return value

    def dialog(self, parsers: ParserNames) -> Dialog:
        """How the answers are read.

        Raises: RequestError: it contradicts itself, or the model's calls cannot be read.
        """
        choice, named, allowed = self._choice()
        tools = {
            tool.function.name: tool.function.parameters or {}
            for tool in self.tools or ()
            if allowed is None or tool.function.name in allowed
        }
        if choice not in ("none", "auto") and not tools:
            raise RequestError("tool_choice goes with tools", "tool_choice")
        for name in (named, *(allowed or ())):
            if name and name not in tools:
                raise RequestError(f"tool_choice: {name!r} is none of tools", "tool_choice")
        dialog = Dialog(
            names=parsers,
            tools=tools,
            choice=choice if tools else "none",
            named=named,
            strict=tuple(
                tool.function.name
                for tool in self.tools or ()
                if tool.function.strict and tool.function.name in tools
            ),
            parallel=self.parallel_tool_calls is not False,
            with_reasoning=self.include_reasoning is not False,
        )
        self._check_readable(dialog)
        return dialog

    def _choice(self) -> tuple[Choice, str, set[str] | None]:
        """The choice, the function it names, and those that are allowed, if not all are."""
        match self.tool_choice:
            case None:
                return "auto", "", None
            case NamedTool() as tool:
                return "named", tool.function.name, None
            case AllowedToolChoice(allowed_tools=allowed):
                return allowed.mode, "", {tool.function.name for tool in allowed.tools}
            case choice:
                return choice, "", None

    def _check_readable(self, dialog: Dialog) -> None:
        """Raises: RequestError"""
        if dialog.choice == "auto" and dialog.calls and dialog.names.tools is None:
            raise RequestError(
                "tools: it is not known how this model writes calls; start the server with "
                "--tool-call-parser NAME, see docs/tools.md",
                "tools",
            )

    def shown_tools(self, dialog: Dialog) -> list[dict[str, Any]] | None:
        """What the chat template is given; with the choice "none", nothing."""
        if not dialog.calls:
            return None
        return [
            tool.model_dump(exclude_none=True)
            for tool in self.tools or ()
            if tool.function.name in dialog.tools
        ]
