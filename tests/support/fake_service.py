"""Canned answers of a service that is none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OPERATION = {
    "id": "op-1",
    "state": "preparing",
    "target": [0, 1, 2, 3],
    "add": [2, 3],
    "remove": [],
    "phase": "spawn",
    "progress": 0.0,
    "phases": {"spawn": 0.1},
    "epoch": 2,
}
DONE = OPERATION | {
    "state": "done",
    "phase": "done",
    "phases": {"spawn": 0.25, "load": 0.5, "commit": 0.01},
    "moved_experts": 32,
    "moved_requests": 3,
    "moved_with_kv": 2,
    "moved_kv_bytes": 3 << 20,
    "recomputed_tokens": 40,
    "pause_ms": 4.25,
}
CLUSTER = {
    "epoch": 7,
    "model": "tiny",
    "max_ranks": 4,
    "ranks": [
        {"id": 0, "state": "active", "host": "h", "pid": 11, "running": 3, "kv_used": 0.5},
        {"id": 2, "state": "leaving", "host": "h", "pid": 12, "waiting": 1, "experts": 32},
    ],
    "placement": {"layers": 4, "experts": 16, "replicas": 64, "experts_per_rank": {"0": 32}},
    "operation": None,
}


@dataclass
class GoingOn:
    """A body in chunks whose end does not come."""

    chunks: list[bytes]


@dataclass
class FakeService:
    """replies: "METHOD /path" → (status, JSON, raw bytes or GoingOn), or a list of them, one a time
    (the last for ever). requests: what came: (METHOD /path, body, authorization)."""

    url: str = ""
    replies: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, Any, str | None]] = field(default_factory=list)

    def reply(self, what: str) -> tuple[int, Any]:
        found = self.replies.get(what, (404, {"error": {"message": f"no {what}"}}))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found


@contextmanager
def answering(fake: FakeService) -> Iterator[None]:
    """It answers at `fake.url` while the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            what = f"{self.command} {self.path}"
            key = self.headers.get("authorization")
            fake.requests.append((what, json.loads(body) if body else None, key))
            status, reply = fake.reply(what)
            self.send_response(status)
            if isinstance(reply, GoingOn):
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for part in reply.chunks:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                return
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a load connects faster than one thread accepts

    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
