"""What the client commands know of a server: requests, answers, and its errors in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import httpx
import msgspec

from flexpert.cluster.views import ClusterView, OperationView
from flexpert.errors import FlexpertError

DEFAULT_URL = "http://127.0.0.1:8000"

T = TypeVar("T")


class ClientError(FlexpertError):
    """The server cannot be reached, or refuses. status: of HTTP, None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """One service. A context manager."""

    def __init__(self, url: str, key: str | None, *, timeout_s: float = 30.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if "://" not in self.url:
            self.url = f"http://{self.url}"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=5.0)
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def cluster(self) -> ClusterView:
        return self._decode(self._send("GET", "/cluster"), ClusterView)

    def begin(self, body: dict[str, Any]) -> OperationView:
        data = self._send("POST", "/cluster/operations", body)
        return self._decode(data, OperationView)

    def operation(self, operation_id: str) -> OperationView:
        data = self._send("GET", f"/cluster/operations/{operation_id}")
        return self._decode(data, OperationView)

    def cancel(self, operation_id: str) -> OperationView:
        data = self._send("DELETE", f"/cluster/operations/{operation_id}")
        return self._decode(data, OperationView)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer, as they come."""
        body = {**body, "stream": True}
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code >= 400:
                    response.read()
                    self._check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == line:
                        continue
                    if data == "[DONE]":
                        return
                    event = self._decode(data.encode(), dict[str, Any])
                    if event.get("error"):
                        raise ClientError(event["error"]["message"])
                    yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        raise ClientError("the answer broke off; look at the server's log")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        self._check(response)
        return response.content

    def _decode(self, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.MsgspecError as error:
            raise ClientError(
                f"{self.url} does not answer like a flexpert service of this version: {error}"
            ) from None

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 400:
            return
        try:
            message = str(msgspec.json.decode(response.content)["error"]["message"])
        except (msgspec.DecodeError, KeyError, TypeError):
            message = f"{self.url} answered {response.status_code}: {response.text[:200].strip()}"
        if response.status_code == 401:
            message += "; give it with --api-key or $FLEXPERT_API_KEY"
        raise ClientError(message, response.status_code)

    def _unreachable(self, error: Exception) -> ClientError:
        if isinstance(error, httpx.ConnectError):
            return ClientError(
                f"no service at {self.url}; start one with 'flexpert serve', or name another "
                "with --url or $FLEXPERT_URL"
            )
        if isinstance(error, httpx.TimeoutException):
            return ClientError(f"{self.url} did not answer in time; is it still starting?")
        if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return ClientError(f"{self.url!r} is no address; write for example {DEFAULT_URL}")
        return ClientError(f"the connection to {self.url} broke: {error or type(error).__name__}")
