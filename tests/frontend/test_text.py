"""Promises of detokenisation and stop texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_head import byte_level_tokenizer, sentencepiece_tokenizer

from flexpert.errors import ContextOverflow, RequestError
from flexpert.frontend.text import REPLACEMENT, StopTexts, TokenText

BYTE_LEVEL = TokenText(byte_level_tokenizer())
PIECES = TokenText(sentencepiece_tokenizer())
BOTH = pytest.mark.parametrize("text", [BYTE_LEVEL, PIECES], ids=["bytes", "pieces"])


def piecewise(text: TokenText, tokens: list[int]) -> list[str]:
    detokenizer = text.detokenizer()
    return [*(detokenizer.push([token]) for token in tokens), detokenizer.flush()]


@given(st.lists(st.integers(0, 265), max_size=40))
def test_any_tokens_give_the_text_the_tokenizer_gives(tokens: list[int]) -> None:
    whole = BYTE_LEVEL.tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join(piecewise(BYTE_LEVEL, tokens)) == whole
    assert BYTE_LEVEL.decode(tokens) == whole


@BOTH
@given(sentence=st.text(max_size=30).map(lambda text: text.replace("\r", "").strip(" ▁")))
def test_a_text_comes_back_and_no_replacement_is_shown_too_early(
    text: TokenText, sentence: str
) -> None:
    if text is PIECES:
        tokens = text.encode(sentence.replace(" ", "▁"), add_special_tokens=False)
    else:
        tokens = text.encode(sentence)
    pieces = piecewise(text, tokens)
    assert "".join(pieces) == sentence
    if REPLACEMENT not in sentence:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_over_several_tokens_appears_with_the_last() -> None:
    tokens = BYTE_LEVEL.encode("€")
    assert len(tokens) == 3
    assert piecewise(BYTE_LEVEL, tokens) == ["", "", "€", ""]
    assert piecewise(BYTE_LEVEL, tokens[:2]) == ["", "", REPLACEMENT]


@BOTH
def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text(text: TokenText) -> None:
    special = text.tokenizer.eos_token_id
    assert text.decode([special, 99_999, -1]) == ""


def test_an_endless_run_of_broken_bytes_is_not_held_for_ever() -> None:
    broken = PIECES.tokenizer.convert_tokens_to_ids("<0xE3>")
    detokenizer = PIECES.detokenizer()
    shown = "".join(detokenizer.push([broken]) for _ in range(100))
    assert len(shown) >= 90
    assert detokenizer._window.__len__() < 20


def test_token_bytes_of_both_kinds() -> None:
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.encode(" ")[0]) == b" "
    assert PIECES.token_bytes(PIECES.tokenizer.convert_tokens_to_ids("<0xE3>")) == b"\xe3"
    assert PIECES.token_bytes(PIECES.tokenizer.convert_tokens_to_ids("▁the")) == b" the"


def by_characters(text: str, stops: list[str]) -> str:
    """The definition: the stop text that is complete first, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_cut_the_same_however_the_text_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    gate = StopTexts(stops)
    shown = "".join([gate.push(piece) for piece in pieces]) + gate.flush()
    assert shown == by_characters("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_text_is_held_back_than_may_begin_a_stop(
    pieces: list[str], stops: list[str]
) -> None:
    gate = StopTexts(stops)
    shown, seen = "", ""
    for piece in pieces:
        shown += gate.push(piece)
        seen += piece
        if gate.met:
            return
        held = seen[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_chat_template() -> None:
    ids = BYTE_LEVEL.chat([{"role": "user", "content": "hi"}])
    assert BYTE_LEVEL.tokenizer.decode(ids) == "<|user|>hi<|end|><|assistant|>"
    with pytest.raises(RequestError, match="no robots"):
        BYTE_LEVEL.chat([{"role": "robot", "content": "hi"}])
    with pytest.raises(RequestError, match="no chat template"):
        PIECES.chat([{"role": "user", "content": "hi"}])


def test_a_text_far_too_long_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TokenText(byte_level_tokenizer())
    longest = 0
    encode = text.encode

    def watched(part: str, **how: bool) -> list[int]:
        nonlocal longest
        longest = max(longest, len(part))
        return encode(part, **how)

    monkeypatch.setattr(text, "encode", watched)
    with pytest.raises(ContextOverflow, match="about"):
        text.encode_bounded("a b" * 400_000, 100_000)
    assert longest < 200_000
    # and one that fits is the same tokens, however it is counted
    prose = "In the beginning " * 20_000
    assert text.encode_bounded(prose, 400_000) == encode(prose)


@BOTH
def test_special_tokens_that_a_parser_needs_are_revealed_and_no_others(text: TokenText) -> None:
    special, needed = text.tokenizer.eos_token_id, text.tokenizer.convert_tokens_to_ids("a")
    name = text.tokenizer.eos_token
    other = text.revealing([name, "<no such token>"])
    assert other.decode([special, needed]) == name + "a"
    assert other.detokenizer().push([special, needed]) == name + "a"
    assert text.decode([special, needed]) == "a"
    assert text.revealing(["a", "<no such token>"]) is text
