"""The settings of speculative decoding, under vLLM's names. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flexpert.reading import shown

_ADVICE = (
    'write ngram, off, or vLLM\'s JSON: {"method": "ngram", "num_speculative_tokens": 7, '
    '"prompt_lookup_max": 5, "prompt_lookup_min": 3}'
)

# vLLM's, of methods with a model of their own or of how steps are batched there
_NOT_HERE = {
    "model": "no draft model is served: method ngram needs none",
    "draft_tensor_parallel_size": "no draft model is served: method ngram needs none",
    "disable_by_batch_size": "max_rows bounds the rows of a step in which tokens are proposed",
}


class SpeculativeSettings(BaseModel):
    """Speculative decoding by n-gram lookup: the last tokens of a sequence are looked up in its
    own text, and those that followed there are proposed, and checked in the next step.

    num_speculative_tokens: proposed at most for one sequence and step. prompt_lookup_max,
    prompt_lookup_min: the longest and the shortest n-gram that is looked up; of one alone it is
    the other, too. max_rows: a step with more rows (prompts and proposed tokens included) has no
    proposed tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: int = Field(7, ge=1, le=64)
    prompt_lookup_max: int = Field(5, ge=1, le=64)
    prompt_lookup_min: int = Field(3, ge=1, le=64)
    max_rows: int = Field(32, ge=2, le=65536)

    @model_validator(mode="before")
    @classmethod
    def _as_in_vllm(cls, given: Any) -> Any:
        """Names of vLLM's that are not served, and the one of two bounds that is not given."""
        if not isinstance(given, dict):
            return given
        method = given.get("method") or "ngram"
        if method != "ngram":
            raise ValueError(f"method {shown(str(method))!r} is not served; ngram is")
        for name, advice in _NOT_HERE.items():
            if given.get(name) is not None:
                raise ValueError(f"{name} is vLLM's: {advice}")
        given = {name: value for name, value in given.items() if value is not None}
        bounds = {"prompt_lookup_max", "prompt_lookup_min"}
        missing = bounds - given.keys()
        if len(missing) == 1:
            given |= {missing.pop(): given[(bounds & given.keys()).pop()]}
        return given

    @model_validator(mode="after")
    def _in_order(self) -> SpeculativeSettings:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min ({self.prompt_lookup_min}) is more than prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        return self


def _read(given: object) -> object:
    """ "ngram", "off", or the fields as JSON."""
    if not isinstance(given, str):
        return given
    if given == "off":
        return None
    if given == "ngram":
        return {}
    try:
        fields = json.loads(given)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{shown(given)!r} is no way to speculate; {_ADVICE}")
    return fields


Speculate = Annotated[SpeculativeSettings | None, BeforeValidator(_read)]
