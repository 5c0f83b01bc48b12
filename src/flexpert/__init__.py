"""Elastic expert-parallel serving of Mixture-of-Experts models.

    from flexpert import LLM, SamplingParams

    with LLM("tiny", ranks=2) as llm:
        print(llm.generate("In the beginning", SamplingParams(max_tokens=32))[0].text)
        llm.scale(4)

The public names load on first use, so that `import flexpert.comm` brings no engine with it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexpert.engine.request import SamplingParams
    from flexpert.llm import LLM

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from flexpert.llm import LLM

        return LLM
    if name == "SamplingParams":
        from flexpert.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'flexpert' has no attribute {name!r}")
