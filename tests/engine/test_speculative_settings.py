"""How tokens are proposed, as it is written down: ours, and vLLM's names of it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from flexpert.config import EngineConfig
from flexpert.speculative_settings import SpeculativeSettings

BY_MODEL = SpeculativeSettings(method="mtp", num_speculative_tokens=1)


@pytest.mark.parametrize(
    "given",
    [
        "mtp",
        '{"method": "mtp", "num_speculative_tokens": 1}',
        '{"method": "deepseek_mtp"}',
        {"method": "qwen3_next_mtp", "num_speculative_tokens": 1},
    ],
)
def test_the_models_own_layer_is_asked_for_by_any_of_its_names(given: Any) -> None:
    found = EngineConfig(speculate=given)
    assert found.speculate == BY_MODEL
    assert EngineConfig.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "mtp", "num_speculative_tokens": 5}, "at most 4 tokens"),
        ({"method": "mtp", "prompt_lookup_max": 4}, "by mtp nothing is looked up"),
        ({"method": "eagle3"}, "ngram and mtp are"),
        ({"method": "mtp", "model": "draft"}, "methods ngram and mtp need none"),
        ("mtp3", "write ngram, mtp, off"),
    ],
)
def test_what_is_not_served_is_refused_with_what_is(given: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EngineConfig(speculate=given)
