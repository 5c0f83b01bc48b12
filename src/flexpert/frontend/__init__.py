"""From a request to text, without HTTP: `LLM` and the server both stand on it.

request_limits   what a request may ask for; prompts → token ids            (pure)
generation       one request → its sequences → the parts of its choices
text             tokens → text as they come, stop texts, chat templates     (pure)
logprobs         log probabilities in the two shapes of OpenAI's API        (pure)
"""
