"""anthropic against a served model. Arguments: the address with /v1, the model."""

import sys

import anthropic

base, model = sys.argv[1:3]  # and the folders that others need
client = anthropic.Anthropic(base_url=base.removesuffix("/v1"), api_key="none", max_retries=0)
talk = {
    "model": model,
    "max_tokens": 16,
    "system": "Answer briefly.",
    "messages": [{"role": "user", "content": "How does Psalm 23 begin?"}],
}
whole = client.messages.create(**talk, extra_body={"temperature": 0, "seed": 1})
assert whole.content[0].text
assert whole.usage.output_tokens <= 16
with client.messages.stream(**talk, extra_body={"temperature": 0, "seed": 1}) as stream:
    assert "".join(stream.text_stream) == whole.content[0].text
look = {
    "name": "look_up",
    "description": "A verse",
    "input_schema": {
        "type": "object",
        "properties": {"psalm": {"enum": [22, 23]}},
        "required": ["psalm"],
        "additionalProperties": False,
    },
}
called = client.messages.create(
    **{**talk, "max_tokens": 80}, tools=[look], tool_choice={"type": "tool", "name": "look_up"}
)
(used,) = [block for block in called.content if block.type == "tool_use"]
assert "psalm" in used.input
talk["messages"] += [
    {"role": "assistant", "content": [block.model_dump() for block in called.content]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "The LORD"}],
    },
]
assert client.messages.create(**talk, tools=[look]).stop_reason
count = {key: talk[key] for key in ("model", "system", "messages")}
assert client.messages.count_tokens(**count).input_tokens > 10
print("ok")
