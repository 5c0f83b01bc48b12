"""Elastic expert-parallel serving of Mixture-of-Experts models.

    from flexpert import LLM, SamplingParams

    with LLM("tiny", ranks=2) as llm:
        print(llm.generate("In the beginning", SamplingParams(max_tokens=32))[0].outputs[0].text)
        llm.scale(4)

The public names load on first use, so that `import flexpert.comm` brings no engine with it. The
elastic exchange is a library of its own, `flexpert.comm`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexpert.version import VERSION

if TYPE_CHECKING:
    from flexpert.async_llm import AsyncLLM
    from flexpert.cluster.views import ClusterView, OperationView
    from flexpert.config import Config, load_config
    from flexpert.engine.request import SamplingParams, StructuredOutputsParams, TokenLogprobs
    from flexpert.errors import (
        ConfigError,
        ContextOverflow,
        CursorLost,
        FlexpertError,
        ModelError,
        OperationConflict,
        OperationError,
        OperationRefused,
        Overloaded,
        RequestError,
        ServiceStopped,
        UnknownOperation,
        UnsupportedModel,
    )
    from flexpert.frontend.outputs import Completion, CompletionOutput
    from flexpert.llm import LLM

__version__ = VERSION

__all__ = [
    "LLM",
    "AsyncLLM",
    "ClusterView",
    "Completion",
    "CompletionOutput",
    "Config",
    "ConfigError",
    "ContextOverflow",
    "CursorLost",
    "FlexpertError",
    "ModelError",
    "OperationConflict",
    "OperationError",
    "OperationRefused",
    "OperationView",
    "Overloaded",
    "RequestError",
    "SamplingParams",
    "ServiceStopped",
    "StructuredOutputsParams",
    "TokenLogprobs",
    "UnknownOperation",
    "UnsupportedModel",
    "__version__",
    "load_config",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "Completion": "frontend.outputs",
    "CompletionOutput": "frontend.outputs",
    "SamplingParams": "engine.request",
    "StructuredOutputsParams": "engine.request",
    "TokenLogprobs": "engine.request",
    "ClusterView": "cluster.views",
    "OperationView": "cluster.views",
    "Config": "config",
    "load_config": "config",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flexpert' has no attribute {name!r}")
    module = import_module(f"flexpert.{_MODULES.get(name, 'errors')}")
    return globals().setdefault(name, getattr(module, name))
