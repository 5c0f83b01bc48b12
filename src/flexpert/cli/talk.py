"""`flexpert chat` and `flexpert complete`: text streams to standard output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from flexpert.cli.client import ServerEvent


class Streams(Protocol):
    """The part of `cli.client.Client` that is needed here."""

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[ServerEvent]: ...


def run_complete(client: Streams, prompt: str, params: dict[str, Any], out: TextIO) -> None:
    """Continue a prompt."""
    _print(_completion_texts(client, {"prompt": prompt, **params}), out)


def run_chat(
    client: Streams,
    first: str | None,
    system: str | None,
    params: dict[str, Any],
    *,
    ask: Any,
    out: TextIO,
) -> None:
    """A conversation; with a first message one answer, else until `ask` raises EOFError.

    Args:
        ask: `input`-like: shows a prompt, returns a line.
    """
    messages: list[dict[str, str]] = []
    if system:
        messages.append({"role": "system", "content": system})
    if first is not None:
        messages.append({"role": "user", "content": first})
        _print(_chat_texts(client, {"messages": messages, **params}), out)
        return
    while True:
        try:
            line = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            answer = _print(_chat_texts(client, {"messages": messages, **params}), out)
        except KeyboardInterrupt:
            out.write("\n(stopped; Ctrl-D leaves)\n")
        messages.append({"role": "assistant", "content": answer})


def _completion_texts(client: Streams, body: dict[str, Any]) -> Iterator[str]:
    for event in client.stream("/v1/completions", body):
        for choice in event.choices:
            yield choice.text or ""


def _chat_texts(client: Streams, body: dict[str, Any]) -> Iterator[str]:
    for event in client.stream("/v1/chat/completions", body):
        for choice in event.choices:
            yield (choice.delta and choice.delta.content) or ""


def _print(texts: Iterator[str], out: TextIO) -> str:
    whole = []
    for text in texts:
        out.write(text)
        out.flush()
        whole.append(text)
    answer = "".join(whole)
    if not answer.endswith("\n"):
        out.write("\n")
        out.flush()
    return answer
