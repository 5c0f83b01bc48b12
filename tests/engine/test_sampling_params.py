"""Promises of `SamplingParams` to those who write them by hand, as for vLLM."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flexpert import SamplingParams
from flexpert.errors import RequestError


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"stop": "."}, {"stop": (".",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None}, {}),
        ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"allowed_token_ids": [3]}, {"allowed_token_ids": (3,)}),
        ({"bad_words": ["x"]}, {"bad_words": ("x",)}),
        ({"top_k": -1}, {"top_k": 0}),
    ],
)
def test_what_vllm_takes_means_the_same(given: dict[str, Any], same: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    params.check()
    assert params == SamplingParams(**same)
    assert hash(params.stop) is not None
    encoded = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(encoded, type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max_token", "SamplingParams has no 'max_token': did you mean 'max_tokens'?"),
        ("temprature", "did you mean 'temperature'?"),
        ("use_beam_search", "beam search is not served"),
        ("best_of", "all n samples are returned"),
        ("zzz", "SamplingParams has no 'zzz'"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name: str, says: str) -> None:
    with pytest.raises(TypeError) as refused:
        SamplingParams(**{name: 1})
    assert says in str(refused.value)


@pytest.mark.parametrize("given", [{"stop": 3}, {"stop": [1]}, {"stop_token_ids": "abc"}])
def test_what_is_of_a_wrong_type_is_refused_when_checked(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="wrong type"):
        SamplingParams(**given).check()
