"""openai against a served model: chats, streams, parsed answers, tools, completions, responses.

Arguments: the address with /v1, the model.
"""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

base, model = sys.argv[1:3]  # and the folders that others need
client = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
TALK = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "How does Psalm 23 begin?"}]},
]
LOOK = {
    "name": "look_up",
    "description": "A verse",
    "parameters": {
        "type": "object",
        "properties": {"psalm": {"type": "integer"}, "kind": {"enum": ["whole", "first"]}},
        "required": ["psalm", "kind"],
        "additionalProperties": False,
    },
}


class Verdict(BaseModel):
    verdict: Literal["yes", "no"]
    sure: bool


short = {"model": model, "max_tokens": 12, "temperature": 0.5, "seed": 3}
whole = client.chat.completions.create(
    messages=TALK, n=2, logprobs=True, top_logprobs=2, stop=["\n\n"], user="somebody", **short
)
assert len(whole.choices) == 2
assert whole.usage.prompt_tokens_details.cached_tokens >= 0
options = {"include_usage": True}
parts = list(
    client.chat.completions.create(messages=TALK, stream=True, stream_options=options, **short)
)
assert parts[-1].usage.completion_tokens <= 12
parsed = client.chat.completions.parse(
    model=model, messages=TALK, response_format=Verdict, max_tokens=80, temperature=0, seed=1
)
assert isinstance(parsed.choices[0].message.parsed, Verdict)
called = client.chat.completions.create(
    messages=TALK,
    tools=[{"type": "function", "function": LOOK}],
    tool_choice={"type": "function", "function": {"name": "look_up"}},
    model=model,
    max_tokens=80,
    seed=1,
)
(call,) = called.choices[0].message.tool_calls
assert set(json.loads(call.function.arguments)) == {"psalm", "kind"}
again = client.chat.completions.create(
    messages=[
        *TALK,
        called.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "The LORD is my shepherd"},
    ],
    tools=[{"type": "function", "function": LOOK}],
    tool_choice="none",
    **short,
)
assert again.choices[0].message.tool_calls is None
text = client.completions.create(
    prompt=["In the beginning", "And"], logprobs=2, echo=True, presence_penalty=0.5, **short
)
assert text.choices[0].text.startswith("In the beginning")
extra = {
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "guided_choice": ["yes", "no"],
    "return_token_ids": True,
    "cache_salt": "mine",
}
chosen = client.completions.create(prompt="Is it so?", extra_body=extra, **short)
assert chosen.choices[0].text in ("yes", "no")
answered = client.responses.create(
    model=model, input="How does Psalm 23 begin?", max_output_tokens=16, temperature=0
)
assert answered.output_text
went_on = client.responses.create(
    model=model, input="Go on.", previous_response_id=answered.id, max_output_tokens=16
)
assert went_on.previous_response_id == answered.id
kinds = [
    event.type
    for event in client.responses.create(
        model=model, input=[{"role": "user", "content": "Hi"}], max_output_tokens=16, stream=True
    )
]
assert kinds[0] == "response.created"
print("ok")
