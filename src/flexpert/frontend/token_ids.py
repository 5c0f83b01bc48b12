"""What stands in for texts in a service without a tokenizer: token ids come in and go out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from flexpert.cluster.served_model import ServedModel
from flexpert.errors import RequestError
from flexpert.frontend.text import (
    PLAIN,
    AnswerText,
    ChatOptions,
    Detokenizer,
    TokenText,
    answer_text,
)
from flexpert.models.token_tables import TokenTables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_text(tokenizer: PreTrainedTokenizerBase | None) -> TokenText:
    """Of a tokenizer, or of none."""
    return TokenIdsOnly() if tokenizer is None else TokenText(tokenizer)


def text_of_answers(model: ServedModel, tables: TokenTables | None) -> AnswerText:
    """Of a service with these tables, or without a tokenizer. Raises: ModelError"""
    return TokenIdsOnly() if tables is None else answer_text(model, tables)


class TokenIdsOnly(TokenText):
    """No token has a text, and a text has no tokens: who gives one is told so.

    Log probabilities name tokens as "token_id:5".
    """

    def __init__(self) -> None:
        self.tokenizer: Any = None
        self.vocabulary_size = 2**31

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        return _NoText()

    def revealing(self, names: Collection[str]) -> TokenText:
        return self

    def template_knows(self, name: str) -> bool:
        return False

    def token_bytes(self, token: int) -> bytes:
        return f"token_id:{token}".encode()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        _refuse("a text cannot be tokenised; send token ids", None)

    def encode_bounded(
        self, text: str, most: int, *, add_special_tokens: bool = True, is_context: bool = True
    ) -> list[int]:
        _refuse("a text cannot be tokenised; send token ids as the prompt", "prompt")

    def decode(self, tokens: Sequence[int]) -> str:
        _refuse("token ids have no text", None)

    def bad_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        _refuse("bad_words are texts", "bad_words")

    def render(self, messages: Sequence[dict[str, Any]], options: ChatOptions = PLAIN) -> str:
        _refuse(
            "there is no chat template either; send token ids as a prompt to /v1/completions",
            "messages",
        )

    def check_stop_texts(self) -> None:
        _refuse("stop texts are never found; use stop_token_ids", "stop")


class _NoText:
    def push(self, tokens: Iterable[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _refuse(why: str, field: str | None) -> NoReturn:
    raise RequestError(f"this service has no tokenizer (--skip-tokenizer-init): {why}", field)
