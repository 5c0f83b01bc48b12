"""langchain-openai against a served model. Arguments: the address with /v1, the model."""

import sys
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

base, model = sys.argv[1:3]  # and the folders that others need


class Verdict(BaseModel):
    """Whether it is so."""

    model_config = ConfigDict(extra="forbid")

    verdict: Literal["yes", "no"]


def look_up(part: Literal["all", "first"]) -> str:
    """Look a psalm up."""
    return part


llm = ChatOpenAI(
    model=model, base_url=base, api_key="none", max_retries=0, max_tokens=60, temperature=0, seed=1
)
assert llm.invoke("How does Psalm 23 begin?").content
assert "".join(part.content for part in llm.stream("How does Psalm 23 begin?"))
bound = llm.bind_tools([look_up], tool_choice="required", strict=True)
(call,) = bound.invoke("Look psalm 23 up.").tool_calls[:1]
assert call["name"] == "look_up"
for method in ("json_schema", "function_calling", "json_mode"):
    asked = llm.with_structured_output(Verdict, method=method, include_raw=True)
    answer = asked.invoke("Is it so? Answer in JSON.")
    if method != "json_mode":  # which promises JSON, not this schema
        assert isinstance(answer["parsed"], Verdict), (method, answer)
print("ok")
