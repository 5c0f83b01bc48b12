"""Promises of the library: `LLM` over a fake head."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_head import FakeHead
from support.waiting import wait_until

import flexpert
from flexpert import LLM, SamplingParams, StructuredOutputsParams
from flexpert.config import Config, ServerConfig
from flexpert.errors import (
    ConfigError,
    FlexpertError,
    OperationError,
    OperationRefused,
    RequestError,
    ServiceStopped,
)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    monkeypatch.setattr("flexpert.cluster.head.Head", FakeHead)
    with LLM(ranks=2) as llm:
        yield llm


def fake(llm: LLM) -> FakeHead:
    head = llm._head
    assert isinstance(head, FakeHead)
    return head


def wait_until_idle(llm: LLM) -> None:
    wait_until(lambda: not fake(llm).running, timeout_s=5)


def test_generate_keeps_the_prompts_order_and_takes_texts_and_ids(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5, seed=1, n=2)
    first, second = llm.generate(["one", [1, 2]], params, progress=True)
    assert (first.prompt, second.prompt) == ("one", None)
    assert second.prompt_token_ids == [1, 2]
    assert len(first.outputs) == 2
    assert len(first.text) == len(first.token_ids) == 5
    assert first.outputs[0].text != first.outputs[1].text
    assert first.outputs[0].finish_reason == "length"
    (again,) = llm.generate("one", params)
    assert again.outputs == first.outputs


def test_answers_have_vllms_attributes(llm: LLM) -> None:
    asked = SamplingParams(max_tokens=3, n=2, logprobs=1)
    first, second = llm.generate(["a", [1, 2]], sampling_params=asked, use_tqdm=False)
    assert (first.prompt, first.finished) == ("a", True)
    assert first.request_id != second.request_id
    assert [output.index for output in first.outputs] == [0, 1]
    for output in first.outputs:
        assert output.finished()
        assert output.cumulative_logprob == 3 * -0.5
    (plain,) = llm.generate("a", SamplingParams(max_tokens=3), use_tqdm=True)
    assert plain.outputs[0].cumulative_logprob is None
    with pytest.raises(RequestError, match="give one of them"):
        llm.generate("a", asked, sampling_params=asked)


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, logprobs=1)]
    first, second = llm.generate(["a", "b"], params)
    assert (len(first.token_ids), first.outputs[0].logprobs) == (1, None)
    assert len(second.outputs[0].logprobs or []) == 2
    with pytest.raises(RequestError, match="1 params were given for 2 prompts"):
        llm.generate(["a", "b"], params[:1])


def test_a_structure_is_checked_before_anything_runs(llm: LLM) -> None:
    structure = StructuredOutputsParams(json={"type": "object"})
    llm.generate("one", SamplingParams(structured_outputs=structure))
    assert list(llm.stream("one", SamplingParams(structured_outputs=structure)))
    for _, _, params in fake(llm).submitted:
        assert params.structured_outputs is not None
        assert '"type":"object"' in (params.structured_outputs.grammar or "")
    seen = len(fake(llm).submitted)
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(json={"not": {}}))
    for refused in (lambda: llm.generate("one", wrong), lambda: llm.stream("one", wrong)):
        with pytest.raises(RequestError, match="'not' is not supported"):
            refused()
    both = StructuredOutputsParams(regex="a", choice=["b"])
    with pytest.raises(RequestError, match="got regex and choice"):
        llm.generate("one", SamplingParams(structured_outputs=both))
    assert len(fake(llm).submitted) == seen


def test_one_wrong_prompt_leaves_none_running(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["fine", "x" * 300])
    wait_until_idle(llm)


@pytest.mark.parametrize(
    "prompts", [b"abc", [b"abc"], [bytearray(b"abc")], {"prompt": "a"}, [1, 2, 3], None, [None]]
)
def test_what_is_no_prompt_is_refused_and_not_taken_for_one(llm: LLM, prompts: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is a text or a list of token ids"):
        llm.generate(prompts)


@pytest.mark.parametrize("params", [{"max_tokens": 2}, [None], ["x"]])
def test_what_are_no_params_is_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="SamplingParams"):
        llm.generate("a", params)


def test_params_may_come_from_a_generator(llm: LLM) -> None:
    lengths = [1, 2]
    found = llm.generate(["a", "b"], (SamplingParams(max_tokens=n) for n in lengths))
    assert [len(completion.token_ids) for completion in found] == lengths


def test_a_failed_sequence_raises_its_error(llm: LLM) -> None:
    fake(llm).behaviour.fail_after = 1
    with pytest.raises(FlexpertError, match="rank 3 is gone"):
        llm.generate(["a", "b"])
    wait_until_idle(llm)


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    assert len(llm.chat(talk)) == 1
    assert len(llm.chat([talk, talk], SamplingParams(max_tokens=1))) == 2


def test_chat_hands_the_template_what_it_knows(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    tokens = fake(llm).tokenizer

    def rendered(**options: Any) -> str:
        (completion,) = llm.chat(talk, sampling_params=SamplingParams(max_tokens=1), **options)
        return str(tokens.decode(completion.prompt_token_ids))

    assert rendered(use_tqdm=True) == "<|user|>hi<|end|><|assistant|>"
    assert rendered(add_generation_prompt=False) == "<|user|>hi<|end|>"
    going_on = rendered(add_generation_prompt=False, continue_final_message=True)
    assert going_on == "<|user|>hi"
    own = "{{ tools[0].function.name }}:{{ mood }}"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    given = {"chat_template": own, "tools": tools, "chat_template_kwargs": {"mood": "calm"}}
    assert rendered(**given) == "look:calm"
    with pytest.raises(RequestError, match="does not use"):
        rendered(chat_template_kwargs={"mood": "calm"})


def test_bad_words_become_tokens(llm: LLM) -> None:
    llm.generate("a", SamplingParams(max_tokens=1, bad_words=["the"]))
    ((_, _, asked),) = fake(llm).submitted
    assert not asked.bad_words
    encode = fake(llm).tokenizer.encode
    assert asked.bad_token_ids == (tuple(encode("the")), tuple(encode(" the")))


def test_stream_gives_the_same_text_and_leaving_it_frees_the_request(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, seed=3)
    assert "".join(llm.stream("x", params)) == llm.generate("x", params)[0].text
    fake(llm).behaviour.gap_s = 0.01
    for _ in llm.stream("x", params):
        break
    wait_until_idle(llm)
    with pytest.raises(RequestError):
        list(llm.stream("x", SamplingParams(n=2)))


def test_scaling_waits_and_says_what_went_wrong(llm: LLM) -> None:
    assert llm.scale(4).state == "done"
    assert [rank.id for rank in llm.cluster().ranks] == [0, 1, 2, 3]
    with pytest.raises(OperationRefused):
        llm.scale(9)
    fake(llm).behaviour.operation_fails = True
    with pytest.raises(OperationError, match="out of memory"):
        llm.scale(add=1)
    assert llm.scale(remove=[1], wait=False).state == "preparing"


def test_close_is_idempotent_and_what_comes_after_is_refused(llm: LLM) -> None:
    llm.close()
    llm.close()
    assert fake(llm).stops == 1
    assert not any(thread.name == "flexpert" for thread in threading.enumerate())
    with pytest.raises(ServiceStopped):
        llm.generate("x")


def test_ctrl_c_while_waiting_frees_what_runs(llm: LLM) -> None:
    fake(llm).behaviour.gap_s = 0.1
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=100))
    wait_until_idle(llm)
    fake(llm).behaviour.gap_s = 0
    assert llm.generate("x")[0].text


def test_a_program_that_forgets_to_close_ends_in_order() -> None:
    code = (
        "import asyncio, flexpert.cluster.head\nfrom support import fake_head\n"
        "class Told(fake_head.FakeHead):\n"
        "    async def stop(self, drain_s=0.0): await asyncio.to_thread(print, 'stopped')\n"
        "flexpert.cluster.head.Head = Told\n"
        "print(len(flexpert.LLM().generate('x')))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
    )
    assert (ran.stdout.split(), ran.stderr) == (["1", "stopped"], "")


def test_settings_by_name_path_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.cluster.head.Head", FakeHead)
    base = Config(server=ServerConfig(port=1234))
    with LLM("tiny", deterministic=True, config=base, engine__max_running=7) as llm:
        assert llm.config.server.port == 1234
        assert llm.config.engine.max_running == 7
        assert llm.config.engine.deterministic
    with pytest.raises(ConfigError, match=r"engine\.speed"):
        LLM(engine__speed=9)


def test_settings_by_vllms_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.cluster.head.Head", FakeHead)
    named = {"tensor_parallel_size": 1, "enable_expert_parallel": True, "enforce_eager": False}
    with LLM("tiny", max_model_len=64, max_num_seqs=3, data_parallel_size=2, **named) as llm:
        assert llm.config.model.max_model_len == 64
        assert (llm.config.engine.max_running, llm.config.cluster.ranks) == (3, 2)
    for wrong, says in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is vLLM's: .* --ranks"),
        ({"gpu_memory_utilization": 0.9}, "--kv-memory"),
        ({"otlp_traces_endpoint": "http://localhost:4318"}, "'flexpert serve' sends traces"),
        ({"speed": 9}, "speed"),
    ):
        with pytest.raises(ConfigError, match=says):
            LLM("tiny", **wrong)


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(FakeHead):
        async def start(self, report: object = None) -> None:
            raise FlexpertError("no memory")

    monkeypatch.setattr("flexpert.cluster.head.Head", Broken)
    with pytest.raises(FlexpertError, match="no memory"):
        LLM()
    assert not any(thread.name == "flexpert" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("statements", "absent"),
    [
        ("import flexpert", {"flexpert.config", "msgspec", "pydantic", "torch"}),
        (
            "import flexpert, flexpert.server; flexpert.SamplingParams",
            {"torch", "transformers", "fastapi"},
        ),
        ("import flexpert.comm", {"flexpert.llm", "flexpert.engine.request", "transformers"}),
        (
            "import flexpert.llm, flexpert.cluster.head, flexpert.frontend.logprobs",
            {"flexpert.server", "fastapi", "starlette", "uvicorn", "httptools"},
        ),
    ],
)
def test_importing_a_part_imports_no_more(statements: str, absent: set[str]) -> None:
    code = f"{statements}\nimport sys\nprint(*{absent!r} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


def test_the_package_shows_what_there_is_to_use_and_nothing_else() -> None:
    assert dir(flexpert) == sorted(flexpert.__all__)
    for name in dir(flexpert):
        assert getattr(flexpert, name) is not None
    raised = {name for name in dir(flexpert.errors) if name[0].isupper()}
    assert raised <= set(dir(flexpert))
    with pytest.raises(AttributeError, match="no attribute 'Sample'"):
        _ = flexpert.Sample


def test_the_version_is_the_packages() -> None:
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert found[1] == flexpert.__version__
