"""A rank with `--device cuda` in Triton's interpreter answers as one on a CPU."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.comm.nixl_ep.package import Package
from flexpert.compat import nixl_ep as compat
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.device_profile import InterpreterProfile
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import RequestSequence, SamplingParams, TokenLogprobs
from flexpert.kernels.device_stream import HostStream, Replay
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.placement import replan

LIMIT_S = 100.0
PROMPTS = {"a": [5, 9, 40, 41], "b": [60, 61, 62]}


class Told:
    """Collects the tokens of each sequence, and what else a rank says."""

    def __init__(self) -> None:
        self.said: queue.Queue[str] = queue.Queue()
        self.tokens: dict[str, list[int]] = {name: [] for name in PROMPTS}
        self.scores: list[TokenLogprobs] = []
        self.memory: msg.Memory | None = None

    def __call__(self, report: msg.Report) -> None:
        match report:
            case msg.Published(events, _):
                for event in events:
                    self.tokens[event.id] += event.tokens
                    self.scores += event.prompt_logprobs or []
                    if event.finish is not None:
                        self.said.put("finished")
            case msg.Prepared(_, _, memory):
                self.memory = memory
                self.said.put("prepared")
            case msg.Failed(_, error) | msg.Rejected(_, error) | msg.Broken(_, _, error):
                self.said.put(error)


def answers(
    source: ModelSource, config: EngineConfig, *, capacity: int = 1, **params: Any
) -> tuple[RankEngine, Told]:
    """What a rank alone says to the prompts, through two epochs. params: of both."""
    told = Told()
    engine = RankEngine(
        0, source, config, capacity=capacity, exchange_timeout_s=LIMIT_S, report=told
    )
    running = threading.Thread(target=engine.run)
    running.start()
    try:
        info = source.info
        placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
        for epoch, name in ((1, "a"), (2, "b")):
            engine.submit(msg.Prepare(epoch, {0: engine.buffer.address}, placement))
            assert told.said.get(timeout=LIMIT_S) == "prepared"
            engine.submit(msg.Commit(epoch))
            engine.submit(msg.Admit([sequence(name, **params)]))
            assert told.said.get(timeout=LIMIT_S) == "finished"
    finally:
        engine.submit(msg.Stop())
        running.join(LIMIT_S)
    assert not running.is_alive()
    return engine, told


def sequence(name: str, prompt: list[int] | None = None, **more: Any) -> RequestSequence:
    params = SamplingParams(max_tokens=2, temperature=0.0, seed=1, **more)
    prompt = PROMPTS[name] if prompt is None else prompt
    return RequestSequence(id=name, prompt=prompt, generated=[], params=params, eos=())


def small_model(path: Path) -> str:
    model = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(model).save_pretrained(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prompts_are_scored_by_their_own_step_though_the_next_is_under_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All pieces of the prompts are computed by one graph, which leaves its logits in one place."""
    source = ModelSource.open(small_model(tmp_path), dtype="float32")
    cpu = EngineConfig(kv_memory=2**20, max_tokens_per_step=16, max_running=2)
    asked = {"prompt": [*range(7, 52)], "prompt_logprobs": 1}
    _, expected = answers(source, cpu, **asked)

    shapes = [GraphShape(1, 1), GraphShape(32, 16)]
    monkeypatch.setattr(InterpreterProfile, "graph_shapes", lambda *_: shapes)
    gpu, told = answers(source, cpu.model_copy(update={"device": "cuda"}), **asked)
    assert gpu.profile.looks_ahead
    assert gpu.runner.graphs is not None
    assert gpu.runner.graphs.captures == 2
    assert told.tokens == expected.tokens
    assert len(told.scores) == len(expected.scores) == 2 * 44
    for found, one in zip(told.scores, expected.scores, strict=True):
        assert found.top_ids == one.top_ids
        assert found.chosen == pytest.approx(one.chosen, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_on_a_gpu_answers_as_on_a_cpu_with_graphs_captured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = ModelSource.open("tiny", dtype="float32")
    cpu = EngineConfig(kv_memory=2 * 2**20, max_tokens_per_step=16, max_running=1)
    _, expected = answers(source, cpu)

    replays = 0
    capture = HostStream.capture

    def counted(*args: Any, **named: Any) -> tuple[Replay, Tensor]:
        replay, logits = capture(*args, **named)

        def counting() -> None:
            nonlocal replays
            replays += 1
            replay()

        return counting, logits

    monkeypatch.setattr(HostStream, "capture", counted)
    engine, told = answers(source, cpu.model_copy(update={"device": "cuda"}))
    assert told.tokens == expected.tokens
    assert all(len(tokens) == 2 for tokens in told.tokens.values())
    assert engine.runner.graphs is not None
    assert engine.runner.graphs.captures == 1  # in the first epoch
    assert replays == 2
    assert told.memory is not None
    assert told.memory.kv == told.memory.dense == 0  # none of it on this machine's side


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_is_captured_that_a_join_would_break(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Package(compat, fixed=False)
    monkeypatch.setattr("flexpert.comm.nixl_ep.nixl_ep_buffer.find", lambda: package)
    config = EngineConfig(
        device="cuda",
        all2all="nixl_ep",
        kv_memory=2 * 2**20,
        max_tokens_per_step=16,
        max_running=1,
    )
    engine, told = answers(
        ModelSource.open(small_model(tmp_path), dtype="bfloat16"), config, capacity=2
    )
    assert engine.runner.graphs is None
    assert all(len(tokens) == 2 for tokens in told.tokens.values())
