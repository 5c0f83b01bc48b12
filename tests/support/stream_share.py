"""Measures what streams that nobody reads cost those that are read.

    PYTHONPATH=src:tests python -m support.stream_share

4 readers alone, then beside 32 others that read, that never read, and that are not streamed at
all; one service of one rank each time, started anew. Shown are the readers' tokens a second, all
sequences' together (as the service counts them), and how much the head's memory has grown.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time

import psutil

from flexpert.bench.load import Target
from flexpert.bench.service import own_service

READERS = 4
OTHERS = 32
SETTLE_S = 3.0
MEASURED_S = float(sys.argv[1]) if len(sys.argv) > 1 else 12.0
FLAGS = ("--ranks", "1", "--max-ranks", "1", "--write-timeout", "600")


def body(**more: object) -> bytes:
    settings = {"prompt": "In the beginning", "max_tokens": 2000, "ignore_eos": True, **more}
    content = json.dumps(settings).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(content)
    )
    return head + content


class Reader:
    """One stream after the other, read at once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.tokens = 0

    async def run(self) -> None:
        reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
        while True:
            writer.write(body(stream=True))
            last = b""
            while b"data: [DONE]" not in last:
                piece = await reader.read(2**16)
                if not piece:
                    raise ConnectionError("the service has closed a stream")
                self.tokens += piece.count(b"data: {")
                last = last[-20:] + piece


async def measure(kind: str) -> None:
    async with own_service(FLAGS, report=lambda line: None) as service:
        head = psutil.Process(service.pid)
        readers = [Reader(service.target) for _ in range(READERS)]
        tasks = [asyncio.ensure_future(reader.run()) for reader in readers]
        silent = []
        for _ in range(0 if kind == "alone" else OTHERS):
            if kind == "that read":
                tasks.append(asyncio.ensure_future(Reader(service.target).run()))
            else:
                raw = socket.create_connection((service.target.host, service.target.port))
                raw.sendall(body(stream=kind == "that never read"))
                silent.append(raw)
        await asyncio.sleep(SETTLE_S)
        before, all_before, memory = (
            sum(reader.tokens for reader in readers),
            await counted(service.target),
            head.memory_info().rss,
        )
        began = time.monotonic()
        cpu = sum(head.cpu_times()[:2])
        await asyncio.sleep(MEASURED_S)
        took = time.monotonic() - began
        read = (sum(reader.tokens for reader in readers) - before) / took
        every = (await counted(service.target) - all_before) / took
        busy = (sum(head.cpu_times()[:2]) - cpu) / took
        grown = (head.memory_info().rss - memory) / 2**20
        name = "4 alone" if kind == "alone" else f"4 beside {OTHERS} {kind}"
        print(
            f"{name:34}{read:8.0f}{read / READERS:14.1f}{every:12.0f}{busy:10.0%}{grown:12.1f}",
            flush=True,
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for raw in silent:
            raw.close()


async def counted(target: Target) -> float:
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(target.message("GET", "/metrics"))
    lines = (await reader.read()).splitlines()
    writer.close()
    return next(float(n.split()[1]) for n in lines if n.startswith(b"flexpert_tokens_total"))


def main() -> None:
    print(f"{'':34}{'tokens/s':>8}{'of one':>14}{'of all':>12}{'head CPU':>10}{'grown MiB':>12}")
    for kind in ("alone", "that read", "that never read", "not streamed"):
        asyncio.run(measure(kind))


if __name__ == "__main__":
    main()
