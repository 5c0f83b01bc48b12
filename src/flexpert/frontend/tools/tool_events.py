"""What a grammar finds in an answer: content, reasoning, calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

import msgspec

_ID_LETTERS = string.ascii_letters + string.digits


class CallDelta(msgspec.Struct):
    """What a call grows by. id, name: on its first delta only. arguments: a piece of JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Parsed(msgspec.Struct):
    """What a piece of an answer's text holds."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = []

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.calls)


def long_id() -> str:
    """Of a call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """Nine letters and digits, which is what Mistral's chat templates demand."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


class AnswerSink:
    """Where a grammar puts what it finds; `take` hands it on.

    White space is held back until it is known what follows it: before, between and behind calls,
    and around the reasoning, it is layout and dropped, but for a line break where content goes on
    behind a call; anywhere else it is content.

    Args:
        most_calls: further ones are dropped; None: no bound.
    """

    def __init__(self, new_id: Callable[[], str] = long_id, most_calls: int | None = None) -> None:
        self._new_id = new_id
        self._most_calls = most_calls
        self._found = Parsed(calls=[])
        self._space = ""  # of the content, held back
        self._after_layout = False  # white space here is layout until there is content
        self._has_content = False
        self._reasoning_space = ""
        self._reasoned = False
        self.calls = 0

    def take(self) -> Parsed:
        """What has come since."""
        found, self._found = self._found, Parsed(calls=[])
        return found

    def content(self, text: str) -> None:
        """A piece of the answer that is shown."""
        solid = text.rstrip()
        if not solid:
            self._space += text
            return
        if self._after_layout:
            self._found.content += "\n" if self._has_content else ""
            solid_part = solid.lstrip()
        else:
            solid_part = self._space + solid
        self._found.content += solid_part
        self._space = text[len(solid) :]
        self._has_content = True
        self._after_layout = False

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks before it answers."""
        solid = text.rstrip()
        if not solid:
            self._reasoning_space += text
            return
        if self._reasoned:
            self._found.reasoning += self._reasoning_space + solid
        else:
            self._found.reasoning += solid.lstrip()
            self._reasoned = True
        self._reasoning_space = text[len(solid) :]

    def end_reasoning(self) -> None:
        """Content follows."""
        self._reasoning_space = ""
        self._drop_space()

    def begin_call(self, name: str, id: str | None = None) -> None:
        """Its arguments follow."""
        self._drop_space()
        self.calls += 1
        if self._is_wanted:
            self._found.calls.append(CallDelta(self.calls - 1, "", id or self._new_id(), name))

    def arguments(self, text: str) -> None:
        """A piece of the latest call's."""
        if not text or not self._is_wanted:
            return
        last = self._found.calls[-1] if self._found.calls else None
        if last is None:
            self._found.calls.append(CallDelta(self.calls - 1, text))
        else:
            last.arguments += text

    def finish(self) -> None:
        """Nothing follows."""
        if not self._after_layout:
            self._found.content += self._space
        self._space = ""

    @property
    def _is_wanted(self) -> bool:
        return self._most_calls is None or self.calls <= self._most_calls

    def _drop_space(self) -> None:
        self._space = ""
        self._after_layout = True
