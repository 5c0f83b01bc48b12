"""A client that sends what it likes, and when: sockets without a library of HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


@contextmanager
def connection(url: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    parts = urlsplit(url)
    with socket.socket() as raw:
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(20)
        raw.connect((parts.hostname, parts.port))
        yield raw


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body and "transfer_encoding" not in headers and "content_length" not in headers:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(**settings: Any) -> bytes:
    body = json.dumps({"prompt": "x", **settings}).encode()
    return request("POST", "/v1/completions", body, content_type="application/json")


def read_all(raw: socket.socket) -> bytes:
    """Until the server closes; a reset is a close, too."""
    pieces = []
    try:
        while piece := raw.recv(2**16):
            pieces.append(piece)
    except ConnectionError:
        pass
    return b"".join(pieces)


def answers(data: bytes) -> list[Answer]:
    """Every answer in what was received, apart from the interim ones."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1", first
        if status == "100":
            continue
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while data:
                size, _, data = data.partition(b"\r\n")
                piece, data = data[: int(size, 16)], data[int(size, 16) + 2 :]
                if not piece:
                    break
                body += piece
        else:
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
        found.append(Answer(int(status), headers, body))
    return found


def ask(url: str, data: bytes) -> list[Answer]:
    """What is answered until the server closes."""
    with connection(url) as raw:
        raw.sendall(data)
        return answers(read_all(raw))


def seconds_until_closed(raw: socket.socket) -> float:
    began = time.monotonic()
    read_all(raw)
    return time.monotonic() - began
