"""Structures → grammars → masks: what is refused, and which tokens are possible."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from support.api_schemas import api_schemas

from flexpert.engine.device_sampler import DeviceSampler
from flexpert.engine.output_grammar import (
    LONGEST_STRUCTURE,
    AnswerMatcher,
    GrammarCache,
    resolve,
)
from flexpert.engine.request import RequestSequence, SamplingParams, StructuredOutputsParams
from flexpert.engine.sampler import Sampler, TokenSampler
from flexpert.engine.sequence import SampleState
from flexpert.engine.token_masks import MaskBuilder, StepMasks
from flexpert.errors import RequestError
from flexpert.frontend.text import TokenText
from flexpert.kernels.device_stream import HostStream
from flexpert.models.source import ModelSource

Structure = StructuredOutputsParams


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open("tiny")


@pytest.fixture(scope="module")
def text(source: ModelSource) -> TokenText:
    return TokenText(source.tokenizer())


@pytest.fixture(scope="module")
def grammars(source: ModelSource) -> GrammarCache:
    return GrammarCache(lambda: source.grammar_tokens)


def possible(matcher: LLMatcher) -> list[int]:
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    assert not matcher.is_error(), matcher.get_error()
    return [int(token) for token in np.flatnonzero(np.unpackbits(bits, bitorder="little"))]


def accepts(structure: Structure, answer: str, source: ModelSource, grammars: GrammarCache) -> bool:
    """Whether the answer can be said, and may end after it."""
    matcher = AnswerMatcher(resolve(structure))
    tokens = source.tokenizer().encode(answer, add_special_tokens=False)
    try:
        said = matcher.advance(tokens, grammars)
    except RequestError:
        return False
    return set(source.info.eos_token_ids) <= set(possible(said))


@pytest.mark.parametrize(
    ("structure", "right", "wrong"),
    [
        (Structure(choice=["yes", 'a "quote"\n', "日本"]), 'a "quote"\n', "ye"),
        (Structure(choice=["a ::= b", "c"]), "a ::= b", "a"),
        (Structure(regex=r"[0-9]{3}-[a-z]+"), "123-abc", "12-abc"),
        (Structure(regex="^(a|b)$"), "b", "^b$"),
        (Structure(grammar='root ::= "(" root ")" | "x"'), "((x))", "((x)"),
        (Structure(grammar='start: item ("," item)*\nitem: /[0-9]+/'), "1,22", "1,"),
        (Structure(json_object=True), '{"a": [1, {"b": null}]}', "[1]"),
        (Structure(json={"type": "integer", "minimum": 7}), "12", "3"),
        (Structure(json='{"const": "x"}'), '"x"', '"y"'),
        (
            Structure(
                structural_tag={
                    "structures": [{"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}],
                    "triggers": ["<f"],
                }
            ),
            "I call <f>null</f>",
            "I call <f>1</f>",
        ),
    ],
)
def test_an_answer_may_end_exactly_where_its_structure_is_complete(
    structure: Structure, right: str, wrong: str, source: ModelSource, grammars: GrammarCache
) -> None:
    assert accepts(structure, right, source, grammars)
    assert not accepts(structure, wrong, source, grammars)


def test_json_is_written_on_one_line(source: ModelSource, grammars: GrammarCache) -> None:
    anything = Structure(json_object=True)
    for answer in ('{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}'):
        assert accepts(anything, answer, source, grammars)
    for answer in ('{"a":1}\n', '{\n"a":1}', '{"a":  1}', '{"a":1 ,"b":2}', " {}"):
        assert not accepts(anything, answer, source, grammars)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "'propertyNames'"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"if": {}, "then": {}}, "'if', 'then'"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"type": "string", "format": "phone"}, "'format' phone"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 2}, "maxProperties"),
        ({"type": "color"}, "color"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
        ({"enum": []}, "Unsatisfiable"),
        ({"x-guidance": {"lenient": True}, "contains": {}}, "'contains'"),
    ],
)
def test_what_a_schema_may_not_have_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(Structure(json=schema), "guided_json")
    assert str(refused.value).startswith("guided_json: ")
    assert named.replace("'", "") in str(refused.value).replace("'", "")
    assert refused.value.field == "guided_json"


@pytest.mark.parametrize(
    ("structure", "named"),
    [
        (Structure(regex="(a"), "unclosed group"),
        (Structure(regex=r"\bword"), "lookarounds"),
        (Structure(grammar='root ::= "a" other'), "other"),
        (Structure(grammar="start: missing"), "missing"),
        (Structure(grammar='{"grammars": []}'), "Lark or GBNF"),
        (Structure(choice=[]), "list of texts"),
        (Structure(choice=["a", ""]), "list of texts"),
        (Structure(choice=["a"] * 5000), "5000 choices"),
        (Structure(json="{"), "no JSON"),
        (Structure(json="[]"), "JSON object"),
        (Structure(json="[" * 100_000), "recursion"),
        (Structure(regex="a" * (LONGEST_STRUCTURE + 1)), f"may be {LONGEST_STRUCTURE}"),
        (Structure(regex="(" * 50_000), "regex"),
        (Structure(regex="\ud800"), "Unicode"),
        (Structure(grammar="start: " + "(" * 50_000), "nested"),
        (Structure(structural_tag={"format": {"type": "any_text"}}), "'format'"),
        (Structure(structural_tag={"structures": [], "triggers": []}), "structures"),
        (
            Structure(structural_tag={"structures": [{"begin": "<f>"}], "triggers": ["["]}),
            "no trigger",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_and_says_why(structure: Structure, named: str) -> None:
    with pytest.raises(RequestError, match=re.escape(named)):
        resolve(structure)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"structured_outputs": Structure()}, "structured_outputs"),
        ({"structured_outputs": Structure(regex="a", choice=["b"])}, "structured_outputs"),
        ({"structured_outputs": Structure(regex="a"), "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": Structure(regex="a"), "min_tokens": 2}, "min_tokens"),
        ({"structured_outputs": Structure(regex=7)}, None),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(
    params: dict[str, Any], field: str | None
) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**params).check()
    assert refused.value.field == field


def test_a_resolved_structure_is_one_that_ranks_compile(source: ModelSource) -> None:
    once = resolve(Structure(json={"type": "null"}))
    assert once.kinds == ["grammar"]
    assert GrammarCache(lambda: source.grammar_tokens).matcher(once).is_accepting() is False


def test_every_schema_of_the_set_compiles_and_random_walks_meet_no_dead_end(
    source: ModelSource, text: TokenText, grammars: GrammarCache
) -> None:
    """Any possible token may be taken at every position: none leads to where nothing follows."""
    rng = random.Random(1)
    ended = 0
    for one in api_schemas():
        matcher = AnswerMatcher(Structure(json=one.schema))
        answer: list[int] = []
        fresh: list[int] = []
        for _ in range(60):
            fresh = [rng.choice(possible(matcher.advance(fresh, grammars)))]
            if fresh[0] in source.info.eos_token_ids:
                json.loads(text.decode(answer))
                ended += 1
                break
            answer += fresh
    assert ended > 20


def sampled(
    structure: Structure | None, generated: list[int] | None = None, **params: Any
) -> SampleState:
    given = SamplingParams(
        **{"max_tokens": 50, "seed": 3, "structured_outputs": structure, **params}
    )
    return SampleState(
        RequestSequence(id="s", prompt=[5, 6], generated=generated or [], params=given, eos=(0, 4))
    )


def step(builder: MaskBuilder, samples: list[SampleState]) -> StepMasks | None:
    builder.begin(samples)
    return builder.finish()


@pytest.fixture
def builder(source: ModelSource, grammars: GrammarCache) -> Any:
    builder = MaskBuilder(grammars, source.info.vocab)
    yield builder
    builder.close()


def test_masks_are_a_function_of_the_tokens(source: ModelSource, builder: MaskBuilder) -> None:
    """Also when half of the answer came from elsewhere, or a step is run again."""
    structure = resolve(Structure(json=api_schemas(3)[2].schema))
    grown = sampled(structure)
    rng = random.Random(2)
    for _ in range(30):
        for _ in range(rng.choice([1, 1, 2])):  # a broken step's masks are made, and not used
            masks = step(builder, [sampled(None), grown])
        assert masks is not None
        moved = sampled(structure, generated=grown.tokens[2:])
        again = step(builder, [moved])
        assert again is not None
        assert (again.words[0] == masks.words[1]).all()
        assert (masks.words[0] == -1).all()
        bits = np.unpackbits(masks.words[1].view(np.uint8), bitorder="little")
        token = int(rng.choice(np.flatnonzero(bits)))
        if token in (0, 4):
            return
        grown.append(token)
    assert step(builder, [sampled(None)]) is None


def test_masks_that_nobody_fetched_spoil_no_later_ones(builder: MaskBuilder) -> None:
    one = sampled(resolve(Structure(regex="[ab]{5}")))
    builder.begin([one])
    one.append(builder_token(builder, one))
    masks = step(builder, [one])
    assert masks is not None
    assert masks.failed == {}


def builder_token(builder: MaskBuilder, state: SampleState) -> int:
    masks = step(builder, [state])
    assert masks is not None
    bits = np.unpackbits(masks.words[0].view(np.uint8), bitorder="little")
    return int(np.flatnonzero(bits)[0])


def test_an_answer_that_cannot_go_on_fails_alone(builder: MaskBuilder) -> None:
    lost = sampled(resolve(Structure(regex="aaa")), generated=[100, 101])
    fine = sampled(resolve(Structure(regex="aaa")))
    masks = step(builder, [lost, fine])
    assert masks is not None
    assert list(masks.failed) == [0]
    assert "cannot go on within its structure" in masks.failed[0]
    assert (masks.words[1] != -1).any()
    alone = step(builder, [sampled(resolve(Structure(regex="aaa")), generated=[100, 101])])
    assert alone is not None
    assert list(alone.failed) == [0]


@pytest.mark.parametrize("on_device", [False, True])
def test_only_possible_tokens_are_sampled(builder: MaskBuilder, on_device: bool) -> None:
    """Greedily where the logits are and on the host, and with every way of sampling."""
    structure = resolve(Structure(choice=["yes", "no"]))
    generator = torch.Generator().manual_seed(0)
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 5.0},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.1, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.5},
    ]
    for rows in (ways, ways[:1]):
        states = [sampled(structure, seed=number, **way) for number, way in enumerate(rows)]
        logits = torch.randn(len(states) + 1, 4096, generator=generator) * 5
        free = sampled(None, temperature=0)
        masks = step(builder, [*states, free])
        assert masks is not None
        chooser: TokenSampler = Sampler()
        if on_device:
            chooser = DeviceSampler(torch.zeros(8, dtype=torch.int64), HostStream())
        result = chooser.start(logits, [*states, free], masks.words).finish().sampled
        bits = np.unpackbits(masks.words[0].view(np.uint8), bitorder="little")
        assert all(bits[token] for token in result.tokens[:-1])
        assert result.tokens[-1] == int(logits[-1].argmax())
    raw = torch.log_softmax(logits[0].double(), 0)
    with_logprobs = sampled(structure, temperature=0, logprobs=2)
    got = Sampler().sample(logits[:1], [with_logprobs], masks.words[:1])
    assert got.logprobs[0] is not None
    assert got.logprobs[0].chosen == pytest.approx(float(raw[got.tokens[0]]), abs=1e-6)


def test_where_nothing_is_possible_no_token_is_made_up(builder: MaskBuilder) -> None:
    state = sampled(resolve(Structure(choice=["yes"])))
    masks = step(builder, [state])
    assert masks is not None
    bits = np.unpackbits(masks.words[0].view(np.uint8), bitorder="little")
    logits = torch.zeros(1, 4096)
    logits[0, torch.from_numpy(np.flatnonzero(bits))] = -torch.inf
    with pytest.raises(ValueError, match="no token is possible"):
        Sampler().sample(logits, [state], masks.words)
