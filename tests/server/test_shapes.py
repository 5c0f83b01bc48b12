"""Answers of many choices are put together a choice at a time."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.fake_head import byte_level_tokenizer

from flexpert.frontend.generation import Part, Usage
from flexpert.frontend.text import TokenText
from flexpert.server.shapes import ChatShape, ChoiceShape, TextShape


@pytest.mark.parametrize("kind", [TextShape, ChatShape])
def test_others_get_their_turn_between_the_choices_of_a_whole_answer(
    kind: type[TextShape] | type[ChatShape],
) -> None:
    text = TokenText(byte_level_tokenizer())
    shape: ChoiceShape = kind("id", 1, "model", text)
    parts = [Part(index, f"text {index}", None, "stop") for index in range(50)]

    async def scenario() -> tuple[bytes, int]:
        answer = asyncio.ensure_future(shape.answer(parts, Usage(1, 2, 3)))
        turns = 0
        while not answer.done():
            turns += 1
            await asyncio.sleep(0)
        return answer.result(), turns

    body, turns = asyncio.run(scenario())
    choices = json.loads(body)["choices"]
    assert [choice["index"] for choice in choices] == list(range(50))
    assert "text 7" in json.dumps(choices[7])
    assert turns >= len(parts)
