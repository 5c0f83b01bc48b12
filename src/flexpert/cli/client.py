"""What the client commands know of a server: requests, answers, and its errors in plain words."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from flexpert.cli.options import DEFAULT_URL
from flexpert.cluster.views import ChangePreview, ClusterView, OperationView, RebalanceView
from flexpert.errors import FlexpertError

_MOST_BYTES = 64 * 2**20  # of an answer, or of one event of a stream
_MOST_SHOWN = 500  # characters of what the server says, in a message

T = TypeVar("T")


class ClientError(FlexpertError):
    """The server cannot be reached, or refuses. status: HTTP's; None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TextDelta(msgspec.Struct):
    """What a chat's answer grows by."""

    content: str | None = None


class Choice(msgspec.Struct):
    """What one choice grows by. text: in a completion. delta: in a chat."""

    text: str | None = None
    delta: TextDelta | None = None


class ServerEvent(msgspec.Struct):
    """One event of a streamed answer."""

    choices: list[Choice] = []
    error: Any = None


class Client:
    """One service. A context manager.

    ca_file: certificates in PEM that are trusted when the URL is https; default: the system's.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float = 30.0,
        ca_file: Path | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if "://" not in self.url:
            self.url = f"http://{self.url}"
        if key and not key.isprintable():
            raise ClientError("the key has characters that cannot be sent, such as line ends")
        headers = {b"authorization": f"Bearer {key}".encode()} if key else {}
        timeout = httpx.Timeout(timeout_s, connect=5.0)
        try:
            verify = trusted(ca_file) if self.url.startswith("https:") else True
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=timeout, verify=verify
            )
        except _REFUSED as error:
            raise self._unreachable(error) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def cluster(self) -> ClusterView:
        return self._decode(self._send("GET", "/cluster"), ClusterView)

    def metrics(self) -> str:
        """In Prometheus' text format."""
        return self._send("GET", "/metrics").decode(errors="replace")

    def begin(self, body: dict[str, Any]) -> OperationView:
        data = self._send("POST", "/cluster/operations", body)
        return self._decode(data, OperationView)

    def proposed_rebalance(self) -> RebalanceView:
        return self._decode(self._send("GET", "/cluster/balance"), RebalanceView)

    def preview(self, body: dict[str, Any]) -> ChangePreview:
        """What that change would move."""
        data = self._send("POST", "/cluster/operations", {**body, "dry_run": True})
        return self._decode(data, ChangePreview)

    def live(self) -> Iterator[tuple[str, bytes]]:
        """Name and data of each event of `GET /cluster/stream`, until the service ends it."""
        try:
            with self._http.stream("GET", "/cluster/stream") as response:
                if response.status_code >= 400:
                    self._check(response, self._read(response))
                name = ""
                for line in self._lines(response):
                    if line.startswith(b"event: "):
                        name = line[7:].decode(errors="replace")
                    elif line.startswith(b"data: "):
                        yield name, line[6:]
        except _REFUSED as error:
            raise self._unreachable(error) from None

    def operation(self, operation_id: str) -> OperationView:
        data = self._send("GET", f"/cluster/operations/{operation_id}")
        return self._decode(data, OperationView)

    def cancel(self, operation_id: str) -> OperationView:
        data = self._send("DELETE", f"/cluster/operations/{operation_id}")
        return self._decode(data, OperationView)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[ServerEvent]:
        """The events of a streamed answer, as they come."""
        body = {**body, "stream": True}
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code >= 400:
                    self._check(response, self._read(response))
                for line in self._lines(response):
                    data = line.removeprefix(b"data: ")
                    if data == line:
                        continue
                    if data == b"[DONE]":
                        return
                    event = self._decode(data, ServerEvent)
                    if event.error:
                        raise ClientError(_shown(_message(event.error)))
                    yield event
        except _REFUSED as error:
            raise self._unreachable(error) from None
        raise ClientError("the answer broke off; look at the server's log")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            with self._http.stream(method, path, json=body) as response:
                content = self._read(response)
                self._check(response, content)
                return content
        except _REFUSED as error:
            raise self._unreachable(error) from None

    def _read(self, response: httpx.Response) -> bytes:
        """All of it: no more than a service would say."""
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if len(content) > _MOST_BYTES:
                raise self._too_much()
        return bytes(content)

    def _lines(self, response: httpx.Response) -> Iterator[bytes]:
        held = b""
        for piece in response.iter_bytes():
            *lines, held = (held + piece).split(b"\n")
            yield from (line.removesuffix(b"\r") for line in lines)
            if len(held) > _MOST_BYTES:
                raise self._too_much()
        yield held

    def _too_much(self) -> ClientError:
        return ClientError(
            f"{self.url} does not answer like a flexpert service: {_MOST_BYTES >> 20} MiB and more"
        )

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ClientError(
                f"{self.url} does not answer like a flexpert service of this version: "
                f"{_shown(str(error))}"
            ) from None

    def _check(self, response: httpx.Response, content: bytes) -> None:
        status = response.status_code
        if status < 400:
            return
        try:
            message = _message(msgspec.json.decode(content, type=dict[str, Any])["error"])
        except (msgspec.MsgspecError, RecursionError, KeyError):
            text = content[: 2 * _MOST_SHOWN].decode(errors="replace")
            message = f"{self.url} answered {status}: {text[:200].strip()}"
        message = _shown(message) or f"{self.url} answered {status} and does not say why"
        if status == 401:
            message += "; give it with --api-key or $FLEXPERT_API_KEY"
        raise ClientError(message, status)

    def _unreachable(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.ConnectError):
            why = _tls_trouble(error)
            if why:
                return ClientError(f"{self.url}: {why}")
            return ClientError(
                f"no service at {self.url}; start one with 'flexpert serve', or name another "
                "with --url or $FLEXPERT_URL"
            )
        if isinstance(error, httpx.TimeoutException):
            return ClientError(f"{self.url} did not answer in time; is it still starting?")
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return ClientError(f"{self.url!r} is no address; write for example {DEFAULT_URL}")
        why = _shown(str(error)) or type(error).__name__
        if isinstance(error, httpx.RemoteProtocolError) and self.url.startswith("http:"):
            why += "; if it serves HTTPS, write https://"
        return ClientError(f"the connection to {self.url} broke: {why}")


# What httpx raises about addresses, connections, and answers that are no HTTP. ValueError: a port
# or a name that is none.
_REFUSED = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError)


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    """Whose certificates are taken; None: the system's. Raises: ClientError"""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ClientError(f"--ca-file {ca_file} holds no certificate in PEM") from None
    except OSError as error:
        raise ClientError(f"cannot read --ca-file {ca_file}: {error.strerror}") from None


def _tls_trouble(error: BaseException) -> str:
    """What is wrong with a TLS connection; "": it is something else."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not to be trusted: {cause.verify_message}; give the certificate "
            "of who signed it with --ca-file or $FLEXPERT_CA_FILE"
        )
    if isinstance(cause, ssl.SSLError):
        return f"no TLS connection ({cause.reason}); if it serves plain HTTP, write http://"
    return ""


def _message(error: object) -> str:
    """The text of an error as OpenAI's API tells it, or of anything else in its place."""
    told = error.get("message") if isinstance(error, dict) else None
    return str(error if told is None else told)


def _shown(text: str) -> str:
    """On one line, and nothing that a terminal would obey."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= _MOST_SHOWN else f"{line[:_MOST_SHOWN]}…"
