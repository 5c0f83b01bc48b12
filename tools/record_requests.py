#!/usr/bin/env python3
"""Stands between clients and a service, and writes down what they send.

    tools/record_requests.py --target http://127.0.0.1:8000 --port 8001 requests.jsonl

One line of JSON for each request with a body: its path and the body. So was made what
tests/server/test_recorded_requests.py replays, from the clients in tests/clients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

_OF_THE_HOP = {
    "authorization",
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "accept-encoding",
}


def recorder(target: str, file: Path) -> Starlette:
    """Hands everything on to the target, and its answers back."""
    client = httpx.AsyncClient(base_url=target, timeout=None)

    async def pass_on(request: Request) -> StreamingResponse:
        body = await request.body()
        if body:
            with file.open("a") as out:
                line = {"path": request.url.path, "body": json.loads(body)}
                out.write(json.dumps(line, sort_keys=True) + "\n")
        headers = {k: v for k, v in request.headers.items() if k not in _OF_THE_HOP}
        asked = client.build_request(
            request.method, str(request.url.path), headers=headers, content=body
        )
        answer = await client.send(asked, stream=True)

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in answer.aiter_raw():
                yield piece

        kept = {k: v for k, v in answer.headers.items() if k not in _OF_THE_HOP}
        return StreamingResponse(
            pieces(), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )

    methods = ["GET", "POST", "DELETE"]
    return Starlette(routes=[Route("/{path:path}", pass_on, methods=methods)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    uvicorn.run(recorder(given.target, given.file), port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
