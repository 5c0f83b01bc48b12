"""GPT-OSS: an answer is a row of messages, each with a channel and perhaps a recipient.

OpenAI's own parser, `openai-harmony`, loads its vocabulary from the network when it is first used,
and works on token ids of that vocabulary alone; here the same is read from the special tokens'
names, with any vocabulary that has them.
"""

from __future__ import annotations

import re

from flexpert.frontend.tools.call_arguments import Tools, written_json
from flexpert.frontend.tools.call_reader import CallReader, Emit, Reading
from flexpert.frontend.tools.tool_events import AnswerSink

HARMONY_MARKERS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|constrain|>",
)
_START, _CHANNEL, _MESSAGE, _END, _CALL, _RETURN, _CONSTRAIN = HARMONY_MARKERS
_ENDS = (_END, _CALL, _RETURN, _START, _CHANNEL)
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


def harmony(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """analysis: reasoning; commentary to a function: a call; any other message: content."""
    space = yield from reader.space()
    header = ""
    if not (yield from reader.next_is("to=")):
        sink.content(space)
        opening = yield from reader.until((_CHANNEL, _START, _MESSAGE), sink.content)
        if opening is None:
            return
        reader.unread(opening)
    while True:
        header, marker = yield from reader.take((_MESSAGE,))
        if marker is None:
            return  # cut off within a header
        if recipient := _RECIPIENT.search(header):
            sink.begin_call(recipient[1])
            end = yield from written_json(reader, sink, _ENDS)
        else:
            end = yield from reader.until(_ENDS, _receiver(header, sink))
        if end is None:
            return
        if end in (_START, _CHANNEL):
            reader.unread(end)


def _receiver(header: str, sink: AnswerSink) -> Emit:
    """What takes the text of a message."""
    channel = header.partition(_CHANNEL)[2].strip()
    return sink.reasoning if channel.startswith("analysis") else sink.content
