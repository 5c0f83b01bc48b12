"""An answer as a row of blocks, as `/v1/responses` and `/v1/messages` have it: reasoning, text,
calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from flexpert.frontend.tools.tool_events import Parsed

BlockKind = Literal["reasoning", "text", "call"]


class Block(msgspec.Struct):
    """text: of a call, its arguments in JSON. id, name: of a call."""

    index: int
    kind: BlockKind
    text: str = ""
    id: str = ""
    name: str = ""


class BlockEvent(msgspec.Struct):
    """Something that happens to a block. delta: what it grows by."""

    kind: Literal["begin", "delta", "end"]
    block: Block
    delta: str = ""


class BlockBuilder:
    """Blocks as they come: one ends where another begins."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open = False

    def feed(self, found: Parsed) -> Iterator[BlockEvent]:
        """What a piece of an answer does."""
        if found.reasoning:
            yield from self._grow("reasoning", found.reasoning)
        if found.content:
            yield from self._grow("text", found.content)
        for call in found.calls:
            if call.name is not None:
                yield from self._begin("call", id=call.id or "", name=call.name)
            yield from self._add(call.arguments)

    def end(self) -> Iterator[BlockEvent]:
        """The answer is over. One without anything is an empty text."""
        if not self.blocks:
            yield from self._begin("text")
        if self._open:
            self._open = False
            yield BlockEvent("end", self.blocks[-1])

    def _grow(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if not self._open or self.blocks[-1].kind != kind:
            yield from self._begin(kind)
        yield from self._add(text)

    def _begin(self, kind: BlockKind, *, id: str = "", name: str = "") -> Iterator[BlockEvent]:
        if self._open:
            yield BlockEvent("end", self.blocks[-1])
        self._open = True
        block = Block(len(self.blocks), kind, "", id, name)
        self.blocks.append(block)
        yield BlockEvent("begin", block)

    def _add(self, text: str) -> Iterator[BlockEvent]:
        if text:
            self.blocks[-1].text += text
            yield BlockEvent("delta", self.blocks[-1], text)


def whole_blocks(found: Parsed) -> list[Block]:
    """Of an answer that was parsed at once."""
    builder = BlockBuilder()
    for _ in builder.feed(found):
        pass
    for _ in builder.end():
        pass
    return builder.blocks


def chat_message(blocks: list[Block]) -> dict[str, object]:
    """The answer as an assistant's message of a chat, which a conversation goes on with."""

    def text(kind: BlockKind) -> str:
        return "".join(block.text for block in blocks if block.kind == kind)

    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.text},
        }
        for block in blocks
        if block.kind == "call"
    ]
    message: dict[str, object] = {"role": "assistant", "content": text("text")}
    if reasoning := text("reasoning"):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message
