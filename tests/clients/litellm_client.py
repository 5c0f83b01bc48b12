"""litellm against a served model. Arguments: the address with /v1, the model."""

import sys

import litellm

base, model = sys.argv[1:3]  # and the folders that others need
litellm.suppress_debug_info = True
COMMON = {"api_base": base, "api_key": "none", "num_retries": 0}
TALK = [{"role": "user", "content": "How does Psalm 23 begin?"}]

whole = litellm.completion(
    model=f"openai/{model}", messages=TALK, max_tokens=12, temperature=0, **COMMON
)
assert whole.choices[0].message.content
assert whole.usage.completion_tokens == 12
streamed = litellm.completion(
    model=f"openai/{model}", messages=TALK, max_tokens=12, temperature=0, stream=True, **COMMON
)
text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
assert text == whole.choices[0].message.content, (text, whole)
hosted = litellm.completion(
    model=f"hosted_vllm/{model}", messages=TALK, max_tokens=12, temperature=0, top_k=3, **COMMON
)
assert hosted.choices[0].message.content
picked = litellm.completion(
    model=f"openai/{model}",
    messages=TALK,
    max_tokens=60,
    seed=1,
    response_format={
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "schema": {"enum": ["yes", "no"]},
        },
    },
    **COMMON,
)
assert picked.choices[0].message.content in ('"yes"', '"no"')
completed = litellm.text_completion(
    model=f"text-completion-openai/{model}", prompt="In the beginning", max_tokens=5, **COMMON
)
assert completed.choices[0].text
try:
    litellm.completion(
        model=f"openai/{model}", messages=[{"role": "user", "content": "word " * 5000}], **COMMON
    )
except litellm.ContextWindowExceededError:
    print("ok")
