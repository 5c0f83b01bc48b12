"""Measures the CPU time of the head's process for one streamed token.

    PYTHONPATH=src:tests python -m support.stream_cost

Clients stream from a head whose every step gives each sequence one token, 100 steps a second.
The clients are a process of their own. "head" is the same run with the streams read by nobody but
a loop: what is left of the difference is HTTP, text and metrics.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import uvicorn
import uvloop

from flexpert.cluster.journal import TokenStream
from flexpert.cluster.views import Delta
from flexpert.config import ServerConfig
from flexpert.engine.request import SamplingParams, TokenLogprobs
from flexpert.server.app import create_app
from flexpert.server.protocol import bounded_protocol
from flexpert.server.service_process import bind
from support.fake_head import FakeHead

STREAMS = (16, 64, 256)
TOKENS = 100
STEP_S = 0.01

CLIENT = """
import socket, sys
port, count, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
path = sys.argv[4].encode()
head = b"POST " + path + b" HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n"
head += b"content-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body)
import selectors
selector = selectors.DefaultSelector()
received = 0
for _ in range(count):
    s = socket.create_connection(("127.0.0.1", port))
    s.sendall(head + body)
    selector.register(s, selectors.EVENT_READ)
while selector.get_map():
    for key, _ in selector.select():
        data = key.fileobj.recv(65536)
        received += data.count(b"data: {")
        if not data:
            selector.unregister(key.fileobj)
print(received)
"""


class SteppingHead(FakeHead):
    """Gives every running sequence one token a step, like ranks in lock-step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._live: dict[str, tuple[TokenStream, SamplingParams, int]] = {}
        self._word = self.tokenizer.encode(" the")[0]
        self._top = TokenLogprobs(-0.5, [1, 2, 3, 4, 5], [-0.5] * 5)

    def submit(self, prompt, params, *, request_id=None, trace=None) -> TokenStream:
        name = f"{request_id}-{len(self._live)}"
        stream = TokenStream(name, lambda id: self._live.pop(id, None) and None)
        self._live[name] = (stream, params, 0)
        return stream

    async def step_until_done(self, sequences: int) -> float:
        """All sequences to their end; CPU seconds of this process meanwhile."""
        while len(self._live) < sequences:
            await asyncio.sleep(0.005)
        began = time.process_time()
        while self._live:
            for name, (stream, params, sent) in list(self._live.items()):
                finish = "length" if sent + 1 == params.max_tokens else None
                logprobs = None if params.logprobs is None else [self._top]
                stream.put(Delta(tokens=[self._word], logprobs=logprobs, finish=finish))
                if finish:
                    del self._live[name]
                else:
                    self._live[name] = (stream, params, sent + 1)
            await asyncio.sleep(STEP_S)
        await asyncio.sleep(0.1)
        return time.process_time() - began


async def drain(stream: TokenStream) -> None:
    async for _ in stream:
        pass


async def head_alone(sequences: int) -> float:
    head = SteppingHead()
    params = SamplingParams(max_tokens=TOKENS)
    readers = [
        asyncio.ensure_future(drain(head.submit([1], params, request_id=str(number))))
        for number in range(sequences)
    ]
    cost = await head.step_until_done(sequences)
    await asyncio.gather(*readers)
    return cost


async def served(path: str, body: dict[str, object], clients: int) -> float:
    head = SteppingHead()
    listener = bind(ServerConfig(port=0))
    config = uvicorn.Config(
        create_app(head),
        lifespan="off",
        http=bounded_protocol(ServerConfig()),
        log_level="error",
        access_log=False,
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    port = listener.getsockname()[1]
    arguments = [str(port), str(clients), json.dumps(body), path]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE)
    cost = await head.step_until_done(clients * int(body.get("n", 1)))
    output, _ = await asyncio.to_thread(client.communicate)
    assert int(output) == clients * TOKENS * int(body.get("n", 1)), output
    server.should_exit = True
    await serving
    return cost


def main() -> None:
    plain = {"max_tokens": TOKENS, "stream": True}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    cases = {
        "completions": ("/v1/completions", plain | {"prompt": "x"}),
        "chat": ("/v1/chat/completions", plain | chat),
        "chat, stop texts": ("/v1/chat/completions", plain | chat | {"stop": ["\n\n", "User:"]}),
        "completions, n=4": ("/v1/completions", plain | {"prompt": "x", "n": 4}),
        "completions, 5 logprobs": ("/v1/completions", plain | {"prompt": "x", "logprobs": 5}),
    }
    for streams in STREAMS:
        per_token = 1e6 / (streams * TOKENS)
        alone = uvloop.run(head_alone(streams)) * per_token
        print(f"{streams:4} streams, {'head alone':26}{alone:6.1f} µs of CPU per token", flush=True)
        for name, (path, body) in cases.items():
            choices = int(body.get("n", 1))
            cost = uvloop.run(served(path, body, streams // choices)) * per_token
            print(f"{streams:4} streams, {name:26}{cost:6.1f} µs of CPU per token", flush=True)


if __name__ == "__main__":
    main()
