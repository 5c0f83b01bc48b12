"""What the tokens of a tokenizer stand for, without it: all that turns answers into text.

Of transformers nothing is imported here until a tokenizer is opened.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class TokenTables(msgspec.Struct, frozen=True):
    """
    pieces: by id, the bytes that a token stands for; of a special one, its name.
    special: ids of special tokens by their names.
    byte_level: a text is the pieces, joined (GPT-2, Qwen, DeepSeek, …).
    chat_template: as the tokenizer has it; None: it has none.
    decoder: the tokenizer in the JSON of the `tokenizers` library, where a text is more than its
    pieces; b"": it is not of that library, or not needed.
    """

    pieces: list[bytes]
    special: dict[str, int]
    byte_level: bool
    chat_template: Any = None
    decoder: bytes = b""


def token_tables(tokenizer: PreTrainedTokenizerBase) -> TokenTables:
    """Takes a microsecond a token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
    to_bytes = _byte_level_bytes if byte_level else _piece_bytes
    vocabulary = tokenizer.get_vocab()
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, id in vocabulary.items():
        pieces[id] = to_bytes(token)
    added = tokenizer.added_tokens_decoder
    special = {token: id for token, id in vocabulary.items() if id in added and added[id].special}
    for id, token in added.items():
        if token.special:
            special.setdefault(token.content, id)
    decoder = "" if byte_level or backend is None else backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    return TokenTables(pieces, special, byte_level, template, decoder.encode())


def _byte_level_alphabet() -> dict[int, str]:
    """Translation from GPT-2's printable stand-ins to the bytes they stand for, as Latin-1.

    Printable bytes stand for themselves, the others, in order, for U+0100 upward. Latin-1
    characters that are no stand-in are sent out of Latin-1, so that encoding notices them.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(others, REPLACEMENT)
    table.update({0x100 + place: chr(byte) for place, byte in enumerate(others)})
    return table


_ALPHABET: Final = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")  # an added token, written as itself


def _piece_bytes(token: str) -> bytes:
    """SentencePiece's ways: ▁ for a space, <0xE3> for a byte."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode("utf-8", "replace")
