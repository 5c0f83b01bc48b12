"""Tokens to text as they come, stop texts, and chat templates: no I/O, no clocks."""

from __future__ import annotations

import codecs
import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from flexpert.cluster.served_model import ServedModel
from flexpert.errors import ContextOverflow, RequestError, context_limit
from flexpert.models.token_tables import REPLACEMENT, TokenTables, token_tables
from flexpert.models.tokenizer_files import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer takes up to 250 bytes of memory a character, and gives the process up where it gets
# none: a text longer than this is counted a piece at a time before it is tokenised whole.
_PIECE = 2**17  # characters


Decode = Callable[[list[int]], str]


class Detokenizer(Protocol):
    """The text of one sequence, token by token.

    What `push` and `flush` return, joined, is the text of the whole sequence. A character whose
    bytes are spread over several tokens appears with the last of them.
    """

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat template is given besides the messages; names as in transformers.

    chat_template: used instead of the model's. kwargs: any other variables that it knows.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    documents: list[Any] | None = None
    tools: list[Any] | None = None
    reasoning_effort: str | None = None
    kwargs: dict[str, Any] = {}

    @property
    def given(self) -> dict[str, Any]:
        """The template's variables."""
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        return {**self.kwargs, **{name: value for name, value in own.items() if value is not None}}


PLAIN = ChatOptions()
OWN_FIELDS = ("documents", "tools", "reasoning_effort")


class AnswerText:
    """What the tokens of one tokenizer mean as text. Made once, shared by all sequences.

    Special tokens have no text in an answer. Ids outside the vocabulary (models pad their
    embedding) have none either.
    """

    def __init__(self, tables: TokenTables, decode: Decode | None = None) -> None:
        """decode: ids to text, where that is more than their pieces."""
        self._decode = decode
        self._names = tables.special
        self._special = frozenset(tables.special.values())
        self._byte_level = tables.byte_level
        self._bytes = tables.pieces
        self.vocabulary_size = len(self._bytes)
        self._shown = [b"" if id in self._special else raw for id, raw in enumerate(self._bytes)]

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """One for a new sequence. skip_special_tokens: else they have their names as text."""
        if self._byte_level:
            return _ByteDetokenizer(self._shown if skip_special_tokens else self._bytes)
        assert self._decode is not None
        special = self._special if skip_special_tokens else frozenset[int]()
        return _WindowDetokenizer(self._decode, special, len(self._shown))

    def check_stop_texts(self) -> None:
        """Raises: RequestError: there are no texts, in which one could be found."""

    def revealing(self, names: Collection[str]) -> AnswerText:
        """The same, but for special tokens of these names, which have them as text in answers: a
        parser has to see them."""
        ids = {self._names.get(name) for name in names}
        revealed = {id for id in ids if id is not None} & self._special
        if not revealed:
            return self
        other = copy.copy(self)
        other._special = self._special - revealed
        other._shown = list(self._shown)
        for id in revealed:
            other._shown[id] = self._bytes[id]
        return other

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; of a special token, its name."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens left out."""
        detokenizer = self.detokenizer()
        return detokenizer.push(tokens) + detokenizer.flush()


class TokenText(AnswerText):
    """The same with the tokenizer itself, for texts that come in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(token_tables(tokenizer), _decoding(tokenizer))
        self.tokenizer = tokenizer
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
        # Characters of the longest token; a normaliser may make a text shorter, but not by much.
        longest = max(len(piece.decode("utf-8", "replace")) for piece in [b" ", *self._bytes])
        self._longest = longest * (1 if self._byte_level and not _normalises(tokenizer) else 4)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises: RequestError: it is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: {error.reason} at character {error.start}"
            ) from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_bounded(
        self, text: str, most: int, *, add_special_tokens: bool = True, is_context: bool = True
    ) -> list[int]:
        """As `encode`, but a text whose length, or whose beginning, tells that it has far more than
        `most` tokens is not tokenised whole.

        is_context: `most` is what the model's context leaves for a prompt; else a limit of its own.

        Raises: RequestError, ContextOverflow
        """
        least = -(-len(text) // self._longest)
        if least > most:
            has = f"the text has {len(text)} characters, which are at least {least} tokens"
            raise _too_long(has, most, is_context=is_context)
        if len(text) > _PIECE:
            self._check_pieces(text, most, is_context=is_context)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def _check_pieces(self, text: str, most: int, *, is_context: bool) -> None:
        """Raises: RequestError, ContextOverflow: pieces of it have far more tokens already; a cut
        through a word makes a few more than there are.
        """
        counted = 0
        for at in range(0, len(text), _PIECE):
            counted += len(self.encode(text[at : at + _PIECE], add_special_tokens=False))
            if counted > most + most // 8 + _PIECE // 64:
                first = f"the first {at + _PIECE} of the text's {len(text)} characters"
                has = f"{first} are about {counted} tokens"
                raise _too_long(has, most, is_context=is_context)

    def bad_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The ways in which an answer may come to have one of these texts: as it stands, and as
        a word of its own, behind a space.

        Raises: RequestError: it is no valid Unicode, or no token stands for it.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                ids = tuple(self.encode(text, add_special_tokens=False))
                if not ids:
                    raise RequestError(f"bad_words: no token stands for {word!r}", "bad_words")
                found[ids] = None
        return tuple(found)

    def chat(self, messages: Sequence[dict[str, Any]], options: ChatOptions = PLAIN) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises: RequestError, as `render`.
        """
        # the template has written the special tokens itself
        return self.encode(self.render(messages, options), add_special_tokens=False)

    def render(self, messages: Sequence[dict[str, Any]], options: ChatOptions = PLAIN) -> str:
        """A conversation as the model's chat template writes it.

        Raises:
            RequestError: the model has no chat template, the template refuses the messages, or
                does not know what it is to be given.
        """
        if not (options.chat_template or self.tokenizer.chat_template):
            raise RequestError(
                "this model has no chat template; send the text as a prompt to /v1/completions"
            )
        given = options.given
        self._check_known(given, options)
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                chat_template=options.chat_template,
                **given,
            )
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a template does with odd messages
            # by raise_exception, or on a shape it did not expect, as Python does
            raise RequestError(
                f"the model's chat template refuses the messages: {error}", "messages"
            ) from None
        return str(text)

    def _check_known(self, given: Mapping[str, Any], options: ChatOptions) -> None:
        """Raises: RequestError: the template would not notice what it is given."""
        if not given:
            return
        for name in options.kwargs:
            if name in self._reserved:
                raise RequestError(
                    f"chat_template_kwargs: {name!r} is not for the template; what of it can be "
                    "said has a field of its own",
                    "chat_template_kwargs",
                )
        template = options.chat_template or self._template(options.tools)
        for name in given:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                field = name if name in OWN_FIELDS else "chat_template_kwargs"
                raise RequestError(
                    f"{field}: the chat template of this model does not use {name[:80]!r}", field
                )

    def template_knows(self, name: str) -> bool:
        """Whether the model's chat template uses a variable of this name."""
        return bool(self.tokenizer.chat_template) and name in self._template(None)

    def _template(self, tools: list[Any] | None) -> str:
        return str(self.tokenizer.get_chat_template(None, tools))


class StopTexts:
    """Lets an answer through up to the first of its stop texts.

    Text that may be the beginning of a stop text is held back until that is decided. If several
    could end the answer, the one that is complete first does, so the result does not depend on
    how the text was cut into tokens.

    met: a stop text has come; nothing more will be let through. include: it is let through, too.
    """

    __slots__ = ("_held", "_include", "_longest", "_stops", "met")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._include = include
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """The part of what is held and of `text` that may be shown now."""
        if self.met or not text:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.met, self._held = True, ""
            end, begin = min(found)
            return text[: end if self._include else begin]
        cut = len(text) - self._may_begin(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is still held back when the answer ends on its own."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class _ByteDetokenizer:
    """For byte-level vocabularies (GPT-2, Qwen, DeepSeek, …): a table look-up and a UTF-8 decoder.

    Half a microsecond a token, where decoding a window twice costs 20.
    """

    __slots__ = ("_begun", "_shown")

    def __init__(self, shown: list[bytes]) -> None:
        self._shown = shown
        self._begun = b""  # the first bytes of a character that is not whole

    def push(self, tokens: Iterable[int]) -> str:
        shown = self._shown
        size = len(shown)
        data = self._begun + b"".join([shown[id] for id in tokens if 0 <= id < size])
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._begun = data[used:]
        return text

    def flush(self) -> str:
        data, self._begun = self._begun, b""
        return codecs.utf_8_decode(data, "replace", True)[0]


class _WindowDetokenizer:
    """For any other vocabulary: decode the last few tokens with and without the new ones.

    A token's text may depend on the one before it (SentencePiece drops the space at the start of
    a text), so each new text is the difference of two decodings that share their beginning.
    """

    # No character has more bytes than 4: after so many tokens U+FFFD stands for itself.
    _PATIENCE = 8

    __slots__ = ("_decode", "_settled", "_size", "_special", "_window")

    def __init__(self, decode: Decode, special: frozenset[int], size: int) -> None:
        self._decode = decode
        self._special = special
        self._size = size
        self._window: list[int] = []
        self._settled = 0  # tokens at the window's start whose text is out already

    def push(self, tokens: Iterable[int]) -> str:
        desired = [id for id in tokens if id not in self._special and 0 <= id < self._size]
        return "".join([self._push(id) for id in desired])

    def flush(self) -> str:
        return self._settle(self._new_text())

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._new_text()
        waiting = len(self._window) - self._settled
        if not text or (text.endswith(REPLACEMENT) and waiting < self._PATIENCE):
            return ""
        return self._settle(text)

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._settled])
        return self._decode(self._window)[len(before) :]

    def _settle(self, text: str) -> str:
        del self._window[: self._settled]
        self._settled = len(self._window)
        return text


def _too_long(has: str, most: int, *, is_context: bool) -> RequestError:
    """has: what is wrong with a text that may have `most` tokens."""
    if is_context:
        return ContextOverflow(f"{context_limit(most + 1)}. However, {has}. Shorten it.")
    return RequestError(f"{has}; {most} can be taken")


def _decoding(tokenizer: PreTrainedTokenizerBase) -> Decode:
    return lambda tokens: str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def answer_text(model: ServedModel, tables: TokenTables) -> AnswerText:
    """Without transformers, unless the tokenizer is one of its own making.

    Raises: ModelError: that cannot be read.
    """
    if tables.byte_level:
        return AnswerText(tables)
    if not tables.decoder:
        tokenizer = open_tokenizer(Path(model.path), trusted=model.trusted)
        return AnswerText(tables, _decoding(tokenizer))
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_buffer(tables.decoder)
    return AnswerText(tables, lambda tokens: str(decoder.decode(tokens, skip_special_tokens=False)))


def _normalises(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return getattr(backend, "normalizer", None) is not None
