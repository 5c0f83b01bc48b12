"""llama-index against a served model. Arguments: the address with /v1, the model."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

base, model = sys.argv[1:3]  # and the folders that others need
llm = OpenAILike(
    model=model, api_base=base, api_key="none", is_chat_model=True, max_tokens=12, temperature=0.0
)
talk = [ChatMessage(role="user", content="How does Psalm 23 begin?")]
whole = llm.chat(talk).message.content
assert whole
assert "".join(part.delta or "" for part in llm.stream_chat(talk)) == whole
plain = OpenAILike(
    model=model, api_base=base, api_key="none", is_chat_model=False, max_tokens=5, temperature=0.0
)
assert plain.complete("In the beginning").text
print("ok")
