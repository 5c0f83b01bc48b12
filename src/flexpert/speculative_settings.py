"""The settings of speculative decoding, under vLLM's names. Pure."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flexpert.reading import shown

_ADVICE = (
    'write ngram, mtp, off, or vLLM\'s JSON: {"method": "ngram", "num_speculative_tokens": 7, '
    '"prompt_lookup_max": 5, "prompt_lookup_min": 3}'
)

# vLLM's, of methods with a model of their own or of how steps are batched there
_NOT_HERE = {
    "model": "no draft model is served: methods ngram and mtp need none",
    "draft_tensor_parallel_size": "no draft model is served: methods ngram and mtp need none",
    "disable_by_batch_size": "max_rows bounds the rows of a step in which tokens are proposed",
}


MOST_BY_MODEL = 4
"""Tokens that a model proposes by its own layer, which is applied again for each."""

_MTP = re.compile(r"(\w+_)?mtp")
"""vLLM's names of the method: mtp, and one for each family, such as deepseek_mtp."""


class SpeculativeSettings(BaseModel):
    """Speculative decoding: tokens are proposed, and checked in the next step.

    method: ngram: the last tokens of a sequence are looked up in its own text, and those that
    followed there are proposed; mtp: the model's layer for multi-token prediction proposes them.
    num_speculative_tokens: proposed at most for one sequence and step. prompt_lookup_max,
    prompt_lookup_min: the longest and the shortest n-gram that is looked up; of one alone it is
    the other, too. max_rows: a step with more rows (prompts and proposed tokens included) has no
    proposed tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["ngram", "mtp"] = "ngram"
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
        given = {name: value for name, value in given.items() if value is not None}
        method = str(given.get("method", "ngram"))
        if _MTP.fullmatch(method):
            given |= {"method": "mtp"}
            given.setdefault("num_speculative_tokens", 1)
        elif method != "ngram":
            raise ValueError(f"method {shown(method)!r} is not served; ngram and mtp are")
        for name, advice in _NOT_HERE.items():
            if name in given:
                raise ValueError(f"{name} is vLLM's: {advice}")
        bounds = {"prompt_lookup_max", "prompt_lookup_min"}
        if given.get("method") == "mtp":
            for name in sorted(bounds & given.keys()):
                if given[name] != cls.model_fields[name].default:  # which may have been written
                    raise ValueError(f"{name} is of method ngram: by mtp nothing is looked up")
            return given
        missing = bounds - given.keys()
        if len(missing) == 1:
            given |= {missing.pop(): given[(bounds & given.keys()).pop()]}
        return given

    @model_validator(mode="after")
    def _fit_each_other(self) -> SpeculativeSettings:
        if self.method == "mtp" and self.num_speculative_tokens > MOST_BY_MODEL:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}: by method mtp a model "
                f"proposes at most {MOST_BY_MODEL} tokens; lower it"
            )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min ({self.prompt_lookup_min}) is more than prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        return self


def _read(given: object) -> object:
    """ "ngram", "mtp", "off", or the fields as JSON."""
    if not isinstance(given, str):
        return given
    if given == "off":
        return None
    if given in ("ngram", "mtp"):
        return {"method": given}
    try:
        fields = json.loads(given)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{shown(given)!r} is no way to speculate; {_ADVICE}")
    return fields


Speculate = Annotated[SpeculativeSettings | None, BeforeValidator(_read)]
