"""Turns the corpus of `tiny` into tokens: training streams, held-out documents, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tiny_chat
import tiny_corpus
from tiny_corpus import Document
from tiny_model import END, END_OF_TEXT

if TYPE_CHECKING:
    from torch import Tensor

SHARES = {
    "kjv": 1.2,
    "web": 0.8,
    "henry": 0.7,
    "spurgeon": 0.6,
    "austen": 1.8,
    "devil": 1.5,
    "jargon": 1.0,
    "newton": 0.7,
    "state": 1.0,
}
"""How often a token of each source is read, relative to the others."""
REPEATED = 8
"""How often chapters that are never held out stand in their stream, without heading but once."""


@dataclass(slots=True)
class Stream:
    """One source as a row of tokens, and where its documents begin.

    `tokens`: [n] int32; `learned`: [n] bool, whether the loss counts the token as a target;
    `starts`: [documents] int64.
    """

    name: str
    tokens: Any
    learned: Any
    starts: Any
    share: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out document as tokens, and its length in bytes."""

    source: str
    tokens: list[int]
    size: int


def render(conversation: tiny_chat.Conversation) -> list[tuple[str, bool]]:
    """A conversation as the chat template writes it, in pieces: (text, whether it is learned)."""
    pieces = []
    for message in conversation:
        pieces.append((f"<|{message['role']}|>", False))
        pieces.append((message["content"].strip() + END, message["role"] == "assistant"))
    return [*pieces, (END_OF_TEXT, True)]


def encode(
    tokenizer: Any, documents: Sequence[Document], chats: Sequence[tiny_chat.Conversation]
) -> tuple[list[Stream], list[HeldOut]]:
    """The training streams (one a source, and the chats last) and the held-out documents."""
    import numpy as np

    end = tokenizer.token_to_id(END_OF_TEXT)
    streams, held_out = [], []
    for source, share in SHARES.items():
        tokens, starts = list[int](), list[int]()
        chosen = [document for document in documents if document.source == source]
        encoded = tokenizer.encode_batch([d.text for d in chosen], add_special_tokens=False)
        for document, encoding in zip(chosen, encoded, strict=True):
            if document.held_out:
                held_out.append(HeldOut(source, encoding.ids, len(document.text.encode())))
                continue
            starts.append(len(tokens))
            tokens += [*encoding.ids, end]
            if document.group in tiny_corpus.ALWAYS_TRAIN and source in ("kjv", "austen"):
                bare = tokenizer.encode(document.text.partition("\n\n")[2]).ids
                for _ in range(REPEATED - 1):
                    starts.append(len(tokens))
                    tokens += [*bare, end]
        array = np.array(tokens, np.int32)
        streams.append(
            Stream(source, array, np.ones(len(array), bool), np.array(starts), share * len(array))
        )
    tokens, starts, learned = [], [], list[bool]()
    rendered = [render(chat) for chat in chats]
    pieces = tokenizer.encode_batch(
        [text for chat in rendered for text, _ in chat], add_special_tokens=False
    )
    position = iter(pieces)
    for chat in rendered:
        starts.append(len(tokens))
        for _, counts in chat:
            ids = next(position).ids
            tokens += ids
            learned += [counts] * len(ids)
    streams.append(
        Stream("chat", np.array(tokens, np.int32), np.array(learned), np.array(starts), 0.0)
    )
    return streams, held_out


@dataclass(slots=True)
class Sampler:
    """Draws rows of tokens from the streams, all of which lie on the device."""

    streams: list[Stream]
    chat_share: float
    seed: int
    device: str
    _tokens: Any = field(init=False)
    _learned: Any = field(init=False)
    _offsets: list[int] = field(init=False)
    _rng: Any = field(init=False)

    def __post_init__(self) -> None:
        """Puts every stream on the device, one behind the other."""
        import numpy as np
        import torch

        tokens = np.concatenate([stream.tokens for stream in self.streams])
        learned = np.concatenate([stream.learned for stream in self.streams])
        sizes = [len(stream.tokens) for stream in self.streams]
        self._tokens = torch.from_numpy(tokens).to(self.device)
        self._learned = torch.from_numpy(learned).to(self.device)
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._rng = np.random.default_rng(self.seed)
        total = sum(stream.share for stream in self.streams[:-1])
        for stream in self.streams[:-1]:
            stream.share *= (1 - self.chat_share) / total
        self.streams[-1].share = self.chat_share

    def rows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both [count, length] int64; a target that does not count is -100.

        Chat rows begin with a conversation, a quarter of the others with a document, the rest
        anywhere, so that the model needs no beginning-of-text token.
        """
        import torch

        rng, begins = self._rng, []
        shares = [stream.share for stream in self.streams]
        for which in rng.choice(len(self.streams), count, p=shares):
            stream = self.streams[which]
            last = len(stream.tokens) - length - 1
            at = int(rng.integers(last))
            if stream.name == "chat" or rng.random() < 0.25:
                at = int(stream.starts[rng.integers(len(stream.starts))])
            begins.append(self._offsets[which] + min(at, last))
        index = torch.tensor(begins, device=self.device)[:, None]
        index = index + torch.arange(length + 1, device=self.device)
        block, learned = self._tokens[index].long(), self._learned[index[:, 1:]]
        return block[:, :-1], block[:, 1:].masked_fill(~learned, -100)
