"""What a request dictates of its calls, on its way to the sampler."""

from __future__ import annotations

from flexpert.engine.request import SamplingParams
from flexpert.errors import RequestError
from flexpert.frontend.tools.tool_choice import Dialog


def enforced(params: SamplingParams, dialog: Dialog) -> SamplingParams:
    """Parameters with which only what `dialog.structure` says can be written.

    Raises: RequestError: something has to be enforced, and the sampler cannot.
    """
    structure = dialog.structure
    if structure is None:
        return params
    field, what = ("tools", "strict") if dialog.choice == "auto" else ("tool_choice", dialog.choice)
    raise RequestError(
        f"{field}: {what} is not served: what a model writes is not enforced by this server", field
    )
