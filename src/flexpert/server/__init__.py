"""HTTP: the OpenAI API, the control API and metrics over one head.

service_process     `flexpert serve` from settings to exit code; app puts the routes together
protocol, gate      limits of a connection; bearer tokens, body size and request counts
openai, control     the routes; http_metrics what they count, openapi their description
schemas, wire       bodies that clients send; bodies that we send
preprocessors       the queues of bodies before the processes that parse and tokenise them,
preprocess_worker   whose main loop runs preprocessing (pure)
shapes, stream      answers in OpenAI's shapes; server-sent events, and clients that have gone
http_errors         every failure as OpenAI's error body
"""
