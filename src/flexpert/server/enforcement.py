"""What a request dictates of its calls, on its way to the sampler."""

from __future__ import annotations

import msgspec

from flexpert.engine.output_grammar import resolve
from flexpert.engine.request import SamplingParams, StructuredOutputsParams
from flexpert.errors import RequestError
from flexpert.frontend.tools.answer_parser import ParserNames
from flexpert.frontend.tools.tool_choice import Dialog


def enforced(params: SamplingParams, dialog: Dialog) -> SamplingParams:
    """Parameters with which only what `dialog.structure` says can be written.

    Raises: RequestError: it cannot be enforced, or there is another structure already.
    """
    structure = dialog.structure
    if structure is None:
        return params
    field = "tools" if dialog.choice == "auto" else "tool_choice"
    if params.structured_outputs is not None:
        what = "strict tools" if dialog.choice == "auto" else f"tool_choice {dialog.choice}"
        raise RequestError(
            f"{field}: {what} cannot be combined with a structure of the answer: one of them "
            "would not hold",
            field,
        )
    grammar = resolve(StructuredOutputsParams(**structure), field)
    return msgspec.structs.replace(params, structured_outputs=grammar)


def without_reasoning(dialog: Dialog) -> Dialog:
    """For answers that follow a structure from their first token on: nothing can be thought."""
    names = ParserNames(dialog.names.tools, None)
    return msgspec.structs.replace(dialog, names=names)
