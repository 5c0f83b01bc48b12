"""The errors that users and callers can catch.

Everything flexpert raises on purpose is a `FlexpertError`:

    FlexpertError
    ├── ConfigError            a setting is wrong; the message names it and the remedy
    ├── ModelError             the checkpoint cannot be served
    │   └── UnsupportedModel   a dense model, or a family that does not fit
    ├── RequestError           the caller's request is wrong (HTTP 400)
    │   └── ContextOverflow    prompt and answer do not fit into the model's context
    ├── Overloaded             too many requests are unfinished (HTTP 429)
    ├── OperationError         a change of the cluster was refused or failed
    │   ├── OperationConflict  another change is running (HTTP 409)
    │   ├── OperationRefused   the target cannot be reached (HTTP 400)
    │   └── UnknownOperation   no operation of that id (HTTP 404)
    ├── ServiceStopped         the service is shutting down
    └── CommError              an exchange between ranks failed; see `flexpert.comm.errors`
"""


class FlexpertError(Exception):
    """Base of every error flexpert raises on purpose."""


class ConfigError(FlexpertError):
    """A setting is missing, malformed or contradicts another."""


class ModelError(FlexpertError):
    """The checkpoint cannot be read or served."""


class UnsupportedModel(ModelError):  # noqa: N818 - reads as what it says
    """The model is dense, or its family does not fit flexpert's two registrations."""


class RequestError(FlexpertError):
    """The request is malformed or asks for something the service cannot do.

    field: the setting or part of the body at fault, if it is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextOverflow(RequestError):  # noqa: N818
    """Prompt plus requested tokens exceed the model's context length.

    Clients tell it by its code (`context_length_exceeded`, langchain) or by its first words
    (litellm), which are OpenAI's and vLLM's; `context_overflow` writes them.
    """


def context_overflow(
    context: int, prompt: int, answer: int, field: str | None = None
) -> ContextOverflow:
    """As OpenAI words it. All in tokens: the model's context, the prompt, what is asked for."""
    return ContextOverflow(
        f"{context_limit(context)}. However, you requested {prompt + answer} tokens ({prompt} in "
        f"the prompt, {answer} in the answer). Shorten the prompt, or lower max_tokens.",
        field,
    )


def context_limit(context: int) -> str:
    """The words by which clients know a context overflow. context: in tokens."""
    return f"This model's maximum context length is {context} tokens"


class Overloaded(FlexpertError):  # noqa: N818
    """As many sequences are unfinished as the journal keeps; try again when some have ended."""


class OperationError(FlexpertError):
    """A change of the cluster was refused or failed."""


class OperationConflict(OperationError):  # noqa: N818
    """Another change with a different target is running."""


class OperationRefused(OperationError):  # noqa: N818
    """The target can never be reached from here: too many ranks, too little memory, …"""


class CursorLost(FlexpertError):  # noqa: N818
    """Events that followed the one that was named are not known any more."""


class UnknownOperation(OperationError):  # noqa: N818
    """There is no operation of that id."""


class ServiceStopped(FlexpertError):  # noqa: N818
    """The service is stopping or has stopped; nothing more is admitted."""
