"""HTTP: the OpenAI API, the control API and metrics over one head.

text        tokens → text as they come, stop texts, chat templates      (pure)
generation  one request → its sequences → the parts of its choices
schemas     bodies that clients send        wire   bodies we send
logprobs    log probabilities in OpenAI's two shapes                    (pure)
errors      every failure as OpenAI's error body
gate        bearer tokens, body size and request counts, in front of everything
stream      server-sent events, and noticing that a client has gone
openai, control, metrics     the routes; app puts them together, run serves them
"""
