"""Promises of the OpenAI API, seen through OpenAI's own client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from support.served_head import Running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def answer(server: Running, text: str, *, per_delta: int = 1) -> None:
    """Every sequence answers with this text, over and over."""
    server.head.behaviour.answer = server.head.tokenizer.encode(text)
    server.head.behaviour.per_delta = per_delta


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "flexpert"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("per_delta", [1, 3])
def test_completion_streamed_and_whole_agree(
    server: Running, client: openai.OpenAI, per_delta: int
) -> None:
    answer(server, "the naïve € ", per_delta=per_delta)
    whole = client.completions.create(model="fake", prompt="hi", max_tokens=40, seed=1)
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="hi",
            max_tokens=40,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == whole.choices[0].text
    assert text.startswith("the naïve € the")
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 40)


def test_chat_streamed_and_whole_agree(server: Running, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    whole = client.chat.completions.create(
        model="fake", messages=messages, max_completion_tokens=8, seed=4
    )
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=messages, max_tokens=8, seed=4, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(text) == 8
    prompt = server.head.submitted[-1][1]
    assert server.head.tokenizer.decode(prompt) == "<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("degraded_from", [None, 3])
def test_an_answer_computed_without_some_experts_says_so_once(
    server: Running, degraded_from: int | None
) -> None:
    server.head.behaviour.degraded_from = degraded_from
    mark = {"degraded": True} if degraded_from is not None else None
    text = {"model": "fake", "prompt": ["hi", "ho"], "max_tokens": 6}
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6}
    for path, body in (("completions", text), ("chat/completions", chat)):
        url = f"{server.url}/v1/{path}"
        assert httpx.post(url, json=body).json().get("flexpert") == mark
        lines = httpx.post(url, json=body | {"stream": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert any(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
        for chunk in chunks:
            last = chunk["choices"][0]["finish_reason"] is not None
            assert chunk.get("flexpert") == (mark if last else None)


def test_a_stop_text_ends_an_answer_before_it_degrades(server: Running) -> None:
    answer(server, "abcdef")
    server.head.behaviour.degraded_from = 4
    body = {"model": "fake", "prompt": "hi", "max_tokens": 6}
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, json=body | {"stop": "c"}).json().get("flexpert") is None
    assert httpx.post(url, json=body | {"stop": "e"}).json()["flexpert"] == {"degraded": True}


def test_chat_without_a_limit_goes_on_to_the_models_context(
    server: Running, client: openai.OpenAI
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    client.chat.completions.create(model="fake", messages=messages)
    assert server.head.submitted[-1][2].max_tokens is None


@pytest.mark.parametrize("stream", [False, True])
def test_n_samples_of_several_prompts_have_seeds_and_indices_of_their_own(
    server: Running, client: openai.OpenAI, stream: bool
) -> None:
    answered = client.completions.create(
        model="fake", prompt=["one", "two"], n=2, seed=2**63 - 1, max_tokens=6, stream=stream
    )
    texts = dict.fromkeys(range(4), "")
    for part in answered if stream else [answered]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert all(len(text) == 6 for text in texts.values())
    assert texts[0] != texts[1]
    seeds = [params.seed for _, _, params in server.head.submitted]
    assert seeds == [2**63 - 1, -(2**63)] * 2


def test_without_a_seed_one_is_drawn_for_every_prompt(
    server: Running, client: openai.OpenAI
) -> None:
    client.completions.create(model="fake", prompt=["one", "one"], max_tokens=1)
    first, second = (params.seed for _, _, params in server.head.submitted)
    assert first is not None
    assert first != second


def test_prompts_may_be_token_ids(server: Running, client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt=[1, 2, 3], max_tokens=1)
    client.completions.create(model="fake", prompt=[[1, 2], [3]], max_tokens=1)
    assert [prompt for _, prompt, _ in server.head.submitted] == [[1, 2, 3], [1, 2], [3]]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_the_answer(
    server: Running, client: openai.OpenAI, stream: bool
) -> None:
    answer(server, "abc")
    answered = client.completions.create(
        model="fake", prompt="say: ", n=2, max_tokens=3, echo=True, stream=stream
    )
    texts = ["", ""]
    for part in answered if stream else [answered]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == ["say: abc"] * 2


@pytest.mark.parametrize("per_delta", [1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_over_tokens_ends_the_answer_and_frees_the_sequence(
    server: Running, client: openai.OpenAI, stream: bool, per_delta: int
) -> None:
    answer(server, "one two three. ", per_delta=per_delta)
    answered = client.completions.create(
        model="fake", prompt="x", max_tokens=100, stop=["zzz", "o thr"], stream=stream
    )
    parts = list(answered) if stream else [answered]
    assert "".join(part.choices[0].text for part in parts) == "one tw"
    assert parts[-1].choices[0].finish_reason == "stop"
    server.until(lambda: not server.head.running)
    assert len(server.head.cancelled) == 1


def test_a_sample_that_met_its_stop_is_freed_while_the_others_go_on(
    server: Running, client: openai.OpenAI
) -> None:
    ask = {"model": "fake", "prompt": "x", "n": 2, "seed": 0, "max_tokens": 100}
    letter = client.completions.create(**ask).choices[0].text[0]
    server.head.behaviour.gap_s = 0.02
    with client.completions.create(**ask, stop=letter, stream=True) as stream:
        next(iter(stream))
        server.until(lambda: len(server.head.cancelled) == 1, 1.0)
        assert len(server.head.running) == 1


def test_stop_texts_count_only_after_min_tokens(server: Running, client: openai.OpenAI) -> None:
    answer(server, "abcd")
    answered = client.completions.create(
        model="fake", prompt="x", max_tokens=20, stop="b", extra_body={"min_tokens": 5}
    )
    assert answered.choices[0].text == "abcda"


def test_a_stop_token_ends_the_answer_and_is_not_shown(
    server: Running, client: openai.OpenAI
) -> None:
    answer(server, "abc")
    stop = server.head.tokenizer.convert_tokens_to_ids("c")
    answered = client.completions.create(
        model="fake", prompt="x", extra_body={"stop_token_ids": [stop]}
    )
    assert (answered.choices[0].text, answered.choices[0].finish_reason) == ("ab", "stop")
    assert answered.usage is not None
    assert answered.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(server: Running, client: openai.OpenAI, stream: bool) -> None:
    answer(server, "€ab. ")
    answered = client.completions.create(
        model="fake", prompt="x", max_tokens=10, logprobs=5, stop="b", stream=stream
    )
    tokens, offsets, values, tops = [], [], [], []
    for part in answered if stream else [answered]:
        for choice in part.choices:
            tokens += choice.logprobs.tokens
            offsets += choice.logprobs.text_offset
            values += choice.logprobs.token_logprobs
            tops += choice.logprobs.top_logprobs
    assert tokens == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "a"]  # none of what was cut
    assert offsets == [0, 0, 0, 1]
    assert values == [-0.5] * 4
    assert all(token in top for token, top in zip(tokens, tops, strict=True))
    assert min(tops[0].values()) == -9999.0  # JSON has no infinity


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(server: Running, client: openai.OpenAI, stream: bool) -> None:
    answer(server, "ab")
    answered = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        stream=stream,
    )
    content = []
    for part in answered if stream else [answered]:
        content += part.choices[0].logprobs.content
    assert [token.token for token in content] == ["a", "b", "a", "b"]
    assert content[0].bytes == [97]
    assert len(content[0].top_logprobs) == 2


def test_vllms_settings_reach_the_engine(server: Running, client: openai.OpenAI) -> None:
    extra = {
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
        "min_tokens": 2,
    }
    client.completions.create(
        model="fake", prompt="x", temperature=0, frequency_penalty=0.5, extra_body=extra
    )
    params = server.head.submitted[-1][2]
    assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.1, 1.2)
    assert (params.ignore_eos, params.min_tokens, params.temperature) == (True, 2, 0)
    assert (params.frequency_penalty, params.max_tokens, params.top_p) == (0.5, 16, 1.0)


REFUSED = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({}, "prompt"),
    ({"prompt": "x", "temperature": -1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "priority": 2**31}, "priority"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"five": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"300": 1}}, "logit_bias"),
    ({"prompt": "x", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "x", "no_such_field": 1}, "no_such_field"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format"),
    ({"prompt": "x", "guided_choice": ["a"], "bad_words": ["a"]}, "bad_words"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x" * 200}, None),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_a_wrong_request_is_refused_and_names_the_field(
    server: Running, body: dict[str, object], param: str | None
) -> None:
    answered = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answered.status_code == 400
    error = answered.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not server.head.running


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ],
)
def test_a_wrong_chat_is_refused(
    server: Running, extra: dict[str, object], param: str | None
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} | extra
    answered = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answered.status_code == 400
    assert answered.json()["error"]["param"] == param


def test_a_prompt_too_long_says_so_in_its_code(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="fake", prompt="x" * 200)
    assert error.value.code == "context_length_exceeded"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-5", prompt="x")
    assert error.value.code == "model_not_found"


def test_a_failed_sequence_is_500_and_frees_its_siblings(
    server: Running, client: openai.OpenAI
) -> None:
    server.head.behaviour.fail_after = 2
    with pytest.raises(openai.InternalServerError, match="rank 3 is gone"):
        client.completions.create(model="fake", prompt="x", n=3)
    server.until(lambda: not server.head.running)


def test_a_failure_within_a_stream_reaches_the_client(
    server: Running, client: openai.OpenAI
) -> None:
    server.head.behaviour.fail_after = 2
    with pytest.raises(openai.APIError, match="rank 3 is gone"):
        list(client.completions.create(model="fake", prompt="x", stream=True))


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_a_stream_frees_its_sequences(
    server: Running, client: openai.OpenAI, n: int
) -> None:
    server.head.behaviour.gap_s = 0.01
    stream = client.completions.create(model="fake", prompt="x", n=n, max_tokens=120, stream=True)
    next(iter(stream))
    stream.close()
    server.until(lambda: len(server.head.cancelled) == n, 1.0)
    assert not server.head.running


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_while_it_waits_frees_its_sequences(server: Running, n: int) -> None:
    server.head.behaviour.gap_s = 10.0
    body = {"prompt": "x", "n": n}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    server.until(lambda: len(server.head.cancelled) == n, 1.0)
    assert not server.head.running


def test_a_stopped_service_says_503(server: Running, client: openai.OpenAI) -> None:
    server.head.serving = False
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 503


def test_a_full_journal_says_429_and_when_to_come_back(
    server: Running, client: openai.OpenAI
) -> None:
    server.head.full = True
    with pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.code == "overloaded"
    assert error.value.response.headers["retry-after"] == "1"


def test_tokenize_and_detokenize(server: Running) -> None:
    answered = httpx.post(f"{server.url}/tokenize", json={"model": "fake", "prompt": "hé the"})
    body = answered.json()
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 128
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": "hé the"}
    messages = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    assert httpx.post(f"{server.url}/tokenize", json=messages).json()["count"] == 3
    assert httpx.post(f"{server.url}/tokenize", json={}).status_code == 400
    wrong = httpx.post(f"{server.url}/detokenize", json={"tokens": [99_999]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")
