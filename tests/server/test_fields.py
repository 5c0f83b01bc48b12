"""Every field of a request is served, with an effect that a test shows, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from support.served_head import Running

from flexpert.engine.request import SamplingParams
from flexpert.server.fields import REFUSED
from flexpert.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

DOCS = Path(__file__).parents[2] / "docs" / "fields.md"
SCHEMAS: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
GENERATING = ("/v1/completions", "/v1/chat/completions")
TALK = [{"role": "user", "content": "hi"}]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": TALK},
    "/tokenize": {"messages": TALK},
    "/detokenize": {"tokens": [1]},
}


def post(server: Running, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={**LEAST[path], **body})


def answered(server: Running, path: str = "/v1/completions", **body: Any) -> Any:
    response = post(server, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def asked(server: Running, path: str, **body: Any) -> tuple[list[int], SamplingParams]:
    """Prompt and parameters as the engine gets them."""
    answered(server, path, max_tokens=body.pop("max_tokens", 2), **body)
    _, prompt, params = server.head.submitted[-1]
    return prompt, params


def events(server: Running, path: str, **body: Any) -> list[dict[str, Any]]:
    response = post(server, path, stream=True, **body)
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


# ---- what each field does: one test each, named in the table -----------------------------------

PASSED_ON: dict[str, tuple[Any, Any]] = {
    "n": (2, 1),  # sampled that many times, each once
    "temperature": (0.5, 0.5),
    "top_p": (0.5, 0.5),
    "top_k": (-1, 0),
    "min_p": (0.25, 0.25),
    "presence_penalty": (0.5, 0.5),
    "frequency_penalty": (-0.5, -0.5),
    "repetition_penalty": (1.5, 1.5),
    "seed": (7, 7),
    "stop": ("end", ("end",)),
    "stop_token_ids": ([5], (5,)),
    "ignore_eos": (True, True),
    "min_tokens": (1, 1),
    "max_tokens": (3, 3),
    "logit_bias": ({"5": 2.5}, {5: 2.5}),
    "allowed_token_ids": ([5, 6], (5, 6)),
    "cache_salt": ("mine", "mine"),
    "priority": (-3, -3),
    "prompt_logprobs": (1, 1),
    "skip_special_tokens": (False, False),
    "include_stop_str_in_output": (True, True),
}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("field", PASSED_ON)
def test_it_reaches_the_engine(server: Running, path: str, field: str) -> None:
    """What the engine makes of it, tests/engine/test_sampler.py and test_scheduler.py show."""
    sent, expected = PASSED_ON[field]
    _, params = asked(server, path, **{field: sent})
    assert getattr(params, field) == expected
    if field == "n":
        assert len(server.head.submitted) == 2


def test_another_model_is_refused(server: Running) -> None:
    for path in SCHEMAS:
        assert post(server, path, model="another").status_code == 404
        assert post(server, path, model="fake").status_code == 200


def test_streams_have_usage_where_they_are_asked_for_it(server: Running) -> None:
    for path in GENERATING:
        assert not any("usage" in chunk for chunk in events(server, path, max_tokens=3))
        last = events(server, path, max_tokens=3, stream_options={"include_usage": True})
        assert [chunk["usage"] is None for chunk in last] == [True] * (len(last) - 1) + [False]
        options = {"include_usage": True, "continuous_usage_stats": True}
        every = events(server, path, max_tokens=3, stream_options=options)
        counts = [chunk["usage"]["completion_tokens"] for chunk in every]
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (1, 3)


def test_bad_words_become_tokens_that_may_not_come(server: Running) -> None:
    encode = server.head.tokenizer.encode
    for path in GENERATING:
        _, params = asked(server, path, bad_words=["the", "xyz"])
        expected = {tuple(encode(text)) for text in ("the", " the", "xyz", " xyz")}
        assert set(params.bad_token_ids) == expected
    assert post(server, GENERATING[0], bad_words=[""]).status_code == 400


def test_prompts_are_cut_to_their_last_tokens(server: Running) -> None:
    long = "abcdefgh" * 30
    prompt, _ = asked(server, "/v1/completions", prompt=long, truncate_prompt_tokens=5)
    assert server.head.tokenizer.decode(prompt) == "defgh"
    prompt, _ = asked(server, "/v1/completions", prompt=long, truncate_prompt_tokens=-1)
    assert len(prompt) == 128 - 2
    talk = [{"role": "user", "content": long}]
    prompt, _ = asked(server, "/v1/chat/completions", messages=talk, truncate_prompt_tokens=9)
    assert len(prompt) == 9
    ids = [1, 2, 3, 4]
    prompt, _ = asked(server, "/v1/completions", prompt=ids, truncate_prompt_tokens=3)
    assert prompt == [2, 3, 4]
    assert post(server, "/v1/completions", truncate_prompt_tokens=0).status_code == 400


def test_special_tokens_and_stop_texts_are_shown_where_asked_for(server: Running) -> None:
    tokenizer = server.head.tokenizer
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    for path in GENERATING:
        server.head.behaviour.answer = [*tokenizer.encode("a"), user, *tokenizer.encode("the")]

        def text(path: str = path, **body: Any) -> str:
            (choice,) = answered(server, path, max_tokens=3, **body)["choices"]
            shown = choice["text"] if "text" in choice else choice["message"]["content"]
            return str(shown)

        assert text() == "athe"
        for spaces in (True, False):
            shown = text(skip_special_tokens=False, spaces_between_special_tokens=spaces)
            assert shown == "a<|user|>the"
        assert text(stop="th") == "a"
        assert text(stop="th", include_stop_str_in_output=True) == "ath"
        stop = {"stop_token_ids": [user], "skip_special_tokens": False}
        assert text(**stop) == "a"
        assert text(**stop, include_stop_str_in_output=True) == "a<|user|>"


def test_special_tokens_are_added_where_asked_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This tokenizer adds none; what the tokenizer is told is what counts."""
    from flexpert.frontend.request_limits import RequestLimits
    from flexpert.frontend.text import TokenText
    from flexpert.server.preprocessing import PreprocessTask, preprocess

    text, told = TokenText(server.head.tokenizer), []

    def encode(source: str, *, add_special_tokens: bool = True) -> list[int]:
        told.append(add_special_tokens)
        return [1]

    monkeypatch.setattr(text, "encode", encode)
    limits = RequestLimits("fake", 300, 128, 8, 128)
    kinds = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
    for path, default in (*zip(GENERATING, (True, False), strict=True), ("/tokenize", False)):
        for value in (None, True, False):
            body = json.dumps({**LEAST[path], "add_special_tokens": value}).encode()
            kind: Any = kinds.get(path, "tokenize")
            preprocess(PreprocessTask(kind, (body,)), text, limits)
            assert told.pop() is (default if value is None else value), path


def test_token_ids_are_given_where_asked_for(server: Running) -> None:
    server.head.behaviour.answer = [70, 71, 72]
    text = answered(server, "/v1/completions", max_tokens=3, return_token_ids=True, n=2)
    prompt = server.head.submitted[-1][1]
    for choice in text["choices"]:
        assert (choice["token_ids"], choice["prompt_token_ids"]) == ([70, 71, 72], prompt)
    chat = answered(server, "/v1/chat/completions", max_tokens=3, return_token_ids=True)
    assert chat["choices"][0]["token_ids"] == [70, 71, 72]
    assert chat["prompt_token_ids"] == server.head.submitted[-1][1]
    assert "token_ids" not in answered(server, "/v1/completions")["choices"][0]
    for path in GENERATING:
        chunks = events(server, path, max_tokens=3, return_token_ids=True)
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        assert tokens == [70, 71, 72]
        assert "prompt_token_ids" in json.dumps(chunks[0])
        assert "prompt_token_ids" not in json.dumps(chunks[1:])


def test_log_probabilities_name_tokens_by_ids_where_asked_for(server: Running) -> None:
    server.head.behaviour.answer = [70]
    body = {"max_tokens": 1, "return_tokens_as_token_ids": True}
    text = answered(server, "/v1/completions", logprobs=1, **body)
    assert text["choices"][0]["logprobs"]["tokens"] == ["token_id:70"]
    asked_for = {"logprobs": True, "top_logprobs": 1}
    chat = answered(server, "/v1/chat/completions", **asked_for, **body)
    (token,) = chat["choices"][0]["logprobs"]["content"]
    assert token["token"] == token["top_logprobs"][0]["token"] == "token_id:70"


def test_log_probabilities_of_answers(server: Running) -> None:
    text = answered(server, "/v1/completions", logprobs=2, max_tokens=2)
    assert len(text["choices"][0]["logprobs"]["top_logprobs"][0]) == 2
    chat = answered(server, "/v1/chat/completions", logprobs=True, top_logprobs=3, max_tokens=2)
    assert len(chat["choices"][0]["logprobs"]["content"][1]["top_logprobs"]) == 3
    refused = post(server, "/v1/chat/completions", top_logprobs=3)
    assert refused.json()["error"]["param"] == "top_logprobs"


def test_log_probabilities_of_prompts(server: Running) -> None:
    text = answered(server, "/v1/completions", prompt="abc", prompt_logprobs=2, max_tokens=1)
    found = text["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    b = str(server.head.tokenizer.convert_tokens_to_ids("b"))
    assert found[1][b] == {"logprob": -0.25, "rank": 1, "decoded_token": "b"}
    assert len(found) == 3
    chat = answered(server, "/v1/chat/completions", prompt_logprobs=0, max_tokens=1)
    assert len(chat["prompt_logprobs"]) == len(server.head.submitted[-1][1])
    assert "prompt_logprobs" not in answered(server, "/v1/completions")["choices"][0]
    refused = post(server, "/v1/completions", prompt_logprobs=1, stream=True)
    assert refused.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize("most", [0, 2])
def test_a_prompt_is_echoed_with_log_probabilities(server: Running, most: int) -> None:
    """As multiple-choice tasks of lm-eval ask; max_tokens 0: the prompt alone."""
    server.head.behaviour.answer = server.head.tokenizer.encode("xy")
    body = {"prompt": ["abc", "the"], "echo": True, "logprobs": 1, "max_tokens": most}
    whole = answered(server, "/v1/completions", **body)
    for choice, prompt in zip(whole["choices"], ("abc", "the"), strict=True):
        assert choice["text"] == prompt + "xy"[:most]
        assert choice["finish_reason"] == "length"
        shown = choice["logprobs"]
        tokens = server.head.tokenizer.encode(prompt)
        assert "".join(shown["tokens"]) == choice["text"]
        assert shown["token_logprobs"] == [None, -0.25, -0.25][: len(tokens)] + [-0.5] * most
        assert shown["top_logprobs"][0] is None
        offsets = [0, 1, 2][: len(tokens)] + [len(prompt) + at for at in range(most)]
        assert shown["text_offset"] == offsets
    assert whole["usage"]["completion_tokens"] == 2 * most
    streamed: dict[int, str] = {}
    names: dict[int, list[str]] = {}
    for chunk in events(server, "/v1/completions", **body):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
        names.setdefault(choice["index"], []).extend(choice["logprobs"]["tokens"])
    for choice in whole["choices"]:
        assert streamed[choice["index"]] == choice["text"]
        assert names[choice["index"]] == choice["logprobs"]["tokens"]
    plain = answered(server, "/v1/completions", prompt="abc", echo=True, max_tokens=0)
    assert plain["choices"][0]["text"] == "abc"
    alone = post(server, "/v1/completions", max_tokens=0).json()["error"]
    assert alone["param"] == "max_tokens"


def test_an_answer_has_the_id_that_its_client_chose(server: Running) -> None:
    for path, prefix in zip(GENERATING, ("cmpl-", "chatcmpl-"), strict=True):
        assert answered(server, path, request_id="mine-1", max_tokens=1)["id"] == prefix + "mine-1"
        header = {"x-request-id": "theirs"}
        found = httpx.post(server.url + path, json={**LEAST[path], "max_tokens": 1}, headers=header)
        assert found.json()["id"] == prefix + "theirs"
        for wrong in ("", "a b", "x" * 257):
            assert post(server, path, request_id=wrong).json()["error"]["param"] == "request_id"


def test_what_says_who_asks_changes_no_answer(server: Running) -> None:
    who = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    for path in GENERATING:
        plain, named = answered(server, path, seed=1), answered(server, path, seed=1, **who)
        assert plain["choices"] == named["choices"]


def test_every_sample_is_returned(server: Running) -> None:
    assert len(answered(server, "/v1/completions", n=3, best_of=3)["choices"]) == 3
    assert post(server, "/v1/completions", n=1, best_of=3).json()["error"]["param"] == "best_of"


def test_nothing_is_filled_in(server: Running) -> None:
    answered(server, "/v1/completions", suffix="")
    refused = post(server, "/v1/completions", suffix="end").json()["error"]
    assert refused["param"] == "suffix"


def test_prompts_and_messages(server: Running) -> None:
    prompt, _ = asked(server, "/v1/completions", prompt="abc")
    assert server.head.tokenizer.decode(prompt) == "abc"
    prompt, _ = asked(server, "/v1/chat/completions")
    assert server.head.tokenizer.decode(prompt) == "<|user|>hi<|end|><|assistant|>"
    assert answered(server, "/tokenize", messages=None, prompt="abc")["count"] == 3
    assert answered(server, "/detokenize", tokens=prompt)["prompt"] == "hi"


def test_a_chat_may_say_how_long_its_answer_is_in_two_ways(server: Running) -> None:
    _, params = asked(server, "/v1/chat/completions", max_completion_tokens=5, max_tokens=9)
    assert params.max_tokens == 5


TEMPLATE = (
    "{{ documents[0].text }}|{{ reasoning_effort }}|{{ enable_thinking }}|{% for m in messages %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _rendered(server: Running, path: str, **body: Any) -> str:
    if path == "/tokenize":
        tokens = answered(server, path, **body)["tokens"]
    else:
        tokens, _ = asked(server, path, **body)
    return str(server.head.tokenizer.decode(tokens))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_the_chat_template_gets_what_it_knows(trusting_server: Running, path: str) -> None:
    server = trusting_server
    shown = _rendered(
        server,
        path,
        chat_template=TEMPLATE,
        chat_template_kwargs={"enable_thinking": False},
        documents=[{"title": "t", "text": "d"}],
        reasoning_effort="low",
    )
    assert shown == "d|low|False|hi<|assistant|>"
    none = {"add_generation_prompt": False}
    assert _rendered(server, path, **none) == "<|user|>hi<|end|>"
    talk = [*TALK, {"role": "assistant", "content": "We"}]
    goes_on = {"messages": talk, "continue_final_message": True}
    assert _rendered(server, path, **goes_on) == "<|user|>hi<|end|><|assistant|>We"
    both = post(server, path, **goes_on, add_generation_prompt=True)
    assert both.json()["error"]["param"] == "continue_final_message"
    for field, value in (
        ("documents", [{"title": "t", "text": "d"}]),
        ("reasoning_effort", "low"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("chat_template_kwargs", {"tokenize": False}),
        ("chat_template", "{% if"),
    ):
        refused = post(server, path, **{field: value})
        assert refused.status_code == 400, field
        param = "messages" if field == "chat_template" else field
        assert refused.json()["error"]["param"] == param


def test_a_prompt_has_no_chat_template(server: Running) -> None:
    body = {"messages": None, "prompt": "x", "add_generation_prompt": False}
    assert post(server, "/tokenize", **body).json()["error"]["param"] == "add_generation_prompt"


def test_a_strangers_template_is_not_run_unasked(server: Running) -> None:
    refused = post(server, "/v1/chat/completions", chat_template="{{ messages }}")
    assert refused.json()["error"]["param"] == "chat_template"
    assert "--trust-request-chat-template" in refused.json()["error"]["message"]


STRUCTURES: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"choice": ["yes", "no"]},
    "guided_json": {"type": "object"},
    "guided_regex": "[ab]+",
    "guided_choice": ["yes", "no"],
    "guided_grammar": 'start: "a"',
}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("field", STRUCTURES)
def test_an_answer_gets_the_structure_that_is_asked_for(
    server: Running, path: str, field: str
) -> None:
    """What comes of it, tests/cluster/test_structured_answers.py shows."""
    _, params = asked(server, path, **{field: STRUCTURES[field]})
    assert params.structured_outputs is not None
    assert params.structured_outputs.kinds == ["grammar"], "made of what was asked for"
    _, params = asked(server, path, response_format={"type": "text"})
    assert params.structured_outputs is None
    nested = post(server, path, response_format={"type": "text", "strange": 1}).json()["error"]
    assert nested["param"] == "response_format.strange"


def test_what_may_be_called(tool_server: Running) -> None:
    """More of it in test_tools.py."""
    path, server = "/v1/chat/completions", tool_server
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    server.head.behaviour.answer = server.head.tokenizer.encode(f"<think>I</think>{call}{call}")
    server.head.behaviour.answer.append(server.head.tokenizer.eos_token_id)
    tools = [{"type": "function", "function": {"name": "now"}}]

    def message(**body: Any) -> dict[str, Any]:
        found: dict[str, Any] = answered(server, path, **body)["choices"][0]["message"]
        return found

    assert len(message(tools=tools)["tool_calls"]) == 2
    assert len(message(tools=tools, parallel_tool_calls=False)["tool_calls"]) == 1
    assert message(tools=tools, tool_choice="none")["content"] == call + call
    assert message(tools=[])["reasoning_content"] == "I"
    assert "reasoning" not in message(include_reasoning=False)


# ---- no third kind ----------------------------------------------------------------------------

_WHO = test_what_says_who_asks_changes_no_answer
_TEMPLATE = test_the_chat_template_gets_what_it_knows
_SPECIAL = test_special_tokens_and_stop_texts_are_shown_where_asked_for
EFFECTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(PASSED_ON, test_it_reaches_the_engine),
    "model": test_another_model_is_refused,
    "stream": test_streams_have_usage_where_they_are_asked_for_it,
    "stream_options": test_streams_have_usage_where_they_are_asked_for_it,
    "bad_words": test_bad_words_become_tokens_that_may_not_come,
    "truncate_prompt_tokens": test_prompts_are_cut_to_their_last_tokens,
    "skip_special_tokens": _SPECIAL,
    "include_stop_str_in_output": _SPECIAL,
    "spaces_between_special_tokens": _SPECIAL,
    "add_special_tokens": test_special_tokens_are_added_where_asked_for,
    "return_token_ids": test_token_ids_are_given_where_asked_for,
    "return_tokens_as_token_ids": test_log_probabilities_name_tokens_by_ids_where_asked_for,
    "logprobs": test_log_probabilities_of_answers,
    "top_logprobs": test_log_probabilities_of_answers,
    "prompt_logprobs": test_log_probabilities_of_prompts,
    "echo": test_a_prompt_is_echoed_with_log_probabilities,
    "request_id": test_an_answer_has_the_id_that_its_client_chose,
    "best_of": test_every_sample_is_returned,
    "suffix": test_nothing_is_filled_in,
    "prompt": test_prompts_and_messages,
    "messages": test_prompts_and_messages,
    "tokens": test_prompts_and_messages,
    "max_completion_tokens": test_a_chat_may_say_how_long_its_answer_is_in_two_ways,
    "add_generation_prompt": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "documents": _TEMPLATE,
    "reasoning_effort": _TEMPLATE,
    **dict.fromkeys(STRUCTURES, test_an_answer_gets_the_structure_that_is_asked_for),
    "tools": test_what_may_be_called,
    "tool_choice": test_what_may_be_called,
    "parallel_tool_calls": test_what_may_be_called,
    "include_reasoning": test_what_may_be_called,
    "user": _WHO,
    "metadata": _WHO,
    "store": _WHO,
    "safety_identifier": _WHO,
    "prompt_cache_key": _WHO,
}


def _table() -> str:
    fields = sorted({name for schema in SCHEMAS.values() for name in schema.model_fields})
    lines = [f"| field | {' | '.join(f'`{path}`' for path in SCHEMAS)} | shown by |"]
    lines.append("|---" * (len(SCHEMAS) + 2) + "|")
    for name in fields:
        served = ["served" if name in s.model_fields else "refused" for s in SCHEMAS.values()]
        shown = EFFECTS[name].__name__ if name in EFFECTS else "nothing"
        lines.append(f"| `{name}` | {' | '.join(served)} | `{shown}` |")
    lines += [
        "",
        "Refused everywhere:",
        "",
        "| field | why, or what to send instead |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    return "\n".join(lines)


def test_the_table_in_the_docs_is_what_is_served() -> None:
    fields = {name for schema in SCHEMAS.values() for name in schema.model_fields}
    assert fields == set(EFFECTS), "each served field has a test that shows its effect"
    assert not fields & set(REFUSED), "no field is both"
    begin, _, rest = DOCS.read_text().partition("<!-- table -->\n")
    shown, _, end = rest.partition("<!-- /table -->")
    if shown.strip() != _table():
        DOCS.write_text(f"{begin}<!-- table -->\n{_table()}\n<!-- /table -->{end}")
        pytest.fail(f"{DOCS} was not up to date; it is now: look at it and commit it")


@pytest.mark.parametrize("path", SCHEMAS)
def test_what_is_not_served_is_refused_by_name(server: Running, path: str) -> None:
    served = SCHEMAS[path].model_fields
    others = {name for schema in SCHEMAS.values() for name in schema.model_fields} - set(served)
    for name in sorted({*REFUSED, *others, "temprature", "no_such_field", "e\x1b[31mvil"}):
        refused = post(server, path, **{name: ["something"]})
        assert refused.status_code == 400, name
        error = refused.json()["error"]
        assert error["param"] == name[:80]
        assert name in error["message"]
        assert post(server, path, **{name: None}).status_code == 200, f"{name}: null says nothing"
    assert not server.head.running
    if path in GENERATING:
        assert "is temperature meant?" in post(server, path, temprature=1).text
        nested = post(server, path, stream=True, stream_options={"include_usag": True})
        assert nested.json()["error"]["param"] == "stream_options.include_usag"


def test_a_value_that_says_what_happens_anyway_is_no_reason_to_refuse(server: Running) -> None:
    usual = {
        "use_beam_search": False,
        "length_penalty": 1.0,
        "modalities": ["text"],
        "service_tier": "auto",
        "cache_prompt": True,
        "functions": [],
        "mm_processor_kwargs": {},
        "repeat_last_n": -1,
    }
    for path in GENERATING:
        answered(server, path, **usual)


def test_a_part_of_a_message_has_no_field_that_is_dropped(server: Running) -> None:
    path = "/v1/chat/completions"
    for name, status in (("cache_control", 200), ("colour", 400)):
        part = {"type": "text", "text": "hi", name: {"type": "ephemeral"}}
        told = post(server, path, messages=[{"role": "user", "content": [part]}], max_tokens=1)
        assert told.status_code == status
    assert "'colour', which is not known" in told.json()["error"]["message"]
    assert told.json()["error"]["param"] == "messages"


def test_a_lenient_server_says_what_it_has_passed_over(trusting_server: Running) -> None:
    for path in ("/tokenize", "/detokenize"):
        told = post(trusting_server, path, strange=1)
        assert (told.status_code, told.headers["x-flexpert-ignored"]) == (200, "strange")
    for path in GENERATING:
        for stream in (False, True):
            body = {"strange": 1, "stranger\n": 2, "stream": stream, "max_tokens": 1}
            response = post(trusting_server, path, **body)
            assert response.status_code == 200
            assert response.headers["x-flexpert-ignored"] == "strange, stranger?"
        assert post(trusting_server, path, use_beam_search=True).status_code == 400
        assert "x-flexpert-ignored" not in post(trusting_server, path).headers


def test_sampling_defaults_of_the_model_hold_where_a_request_says_nothing(
    trusting_server: Running,
) -> None:
    for path in GENERATING:
        _, params = asked(trusting_server, path)
        assert (params.temperature, params.top_k) == (0.6, 20)
        _, params = asked(trusting_server, path, temperature=1)
        assert (params.temperature, params.top_k) == (1, 20)
