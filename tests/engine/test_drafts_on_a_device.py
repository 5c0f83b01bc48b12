"""A GPU rank whose model proposes tokens, in Triton's interpreter: it never waits to know them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from support.agreeing import agreeing_model
from support.draft_turns import in_turns

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.comm import RankTimeout
from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.device_profile import InterpreterProfile
from flexpert.engine.draft_counts import DraftCounts
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.step_costs import DraftPhases
from flexpert.engine.step_plan import StepPlan
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.placement import replan
from flexpert.speculative_settings import SpeculativeSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LIMIT_S = 100.0


def work() -> list[RequestSequence]:
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.7, "seed": 4, "stop_token_ids": tuple(range(0, 128, 4))},
        {"logprobs": 2, "max_tokens": 9},
        {"stop_token_ids": tuple(range(0, 128, 3)), "min_tokens": 5},
        {"repetition_penalty": 1.3, "max_tokens": 6},
    ]
    return [
        RequestSequence(
            id=str(number),
            prompt=[(7 * number + 3 * at) % 128 for at in range(5 + 6 * number)],
            generated=[],
            params=SamplingParams(**{"temperature": 0, "seed": 0, "max_tokens": 16} | way),
            eos=(),
        )
        for number, way in enumerate(ways)
    ]


class Told:
    """What a rank says. ahead: steps with proposed tokens that the host did not know. left_out:
    steps without the draft layer."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.drafts = DraftCounts(0, 0, [])
        self.said: list[str] = []
        self.heard = threading.Condition()
        self.ahead = 0
        self.left_out = 0

    def __call__(self, report: msg.Report) -> None:
        with self.heard:
            match report:
                case msg.Published(events, _, _, _, drafts):
                    for event in events:
                        self.tokens.setdefault(event.id, []).extend(event.tokens)
                        self.said += ["finished"] * (event.finish is not None)
                    self.drafts += drafts or DraftCounts(0, 0, [])
                case msg.Prepared():
                    self.said.append("prepared")
                case msg.Broken():
                    self.said.append("broken")
                case msg.Failed(_, error) | msg.Rejected(_, error):
                    self.said.append(error)
            self.heard.notify()

    def next(self) -> str:
        with self.heard:
            assert self.heard.wait_for(lambda: self.said, LIMIT_S)
            return self.said.pop(0)


def answers(source: ModelSource, config: EngineConfig, broken: int | None = None) -> Told:
    """broken: the step that turns out not to be whole; an epoch later it is computed again."""
    told, checks, info = Told(), 0, source.info
    engine = RankEngine(0, source, config, capacity=1, exchange_timeout_s=LIMIT_S, report=told)
    plan_step, check = engine.scheduler.plan, engine.buffer.check

    def counted() -> StepPlan:
        step = plan_step()
        told.left_out += not step.on
        told.ahead += step.sources is not None and step.drafts is not None
        return step

    def breaking(*, wait: bool = True) -> tuple[int, ...]:
        nonlocal checks
        checks += 1
        if checks == broken:
            raise RankTimeout((1,), "combine", 1, 0.0)
        return check(wait=wait)

    engine.scheduler.plan = counted  # type: ignore[method-assign]
    engine.buffer.check = breaking  # type: ignore[method-assign]

    def prepare(epoch: int) -> None:
        placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
        engine.submit(msg.Prepare(epoch, {0: engine.buffer.address}, placement))
        assert told.next() == "prepared"
        engine.submit(msg.Commit(epoch))

    running = threading.Thread(target=engine.run)
    running.start()
    try:
        prepare(1)
        engine.submit(msg.Admit(work()))
        left = len(work())
        while left:
            said = told.next()
            if said == "broken":
                engine.submit(msg.Halt(1))
                prepare(2)
            else:
                assert said == "finished"
                left -= 1
    finally:
        engine.submit(msg.Stop())
        running.join(LIMIT_S)
    assert not running.is_alive()
    assert engine.scheduler.pool.used == 0
    assert broken is None or checks > broken
    return told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return agreeing_model(tmp_path_factory.mktemp("agreeing"))


CPU = EngineConfig(kv_memory=2**20, max_tokens_per_step=24, max_running=4, kv_block_size=4)


@pytest.fixture(scope="module")
def expected(model: Path) -> Told:
    return answers(ModelSource.open(str(model), dtype="float32"), CPU)


def test_it_answers_as_a_cpu_does_in_graphs_and_when_a_step_is_broken(
    model: Path, expected: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = SpeculativeSettings(method="mtp", num_speculative_tokens=4)
    monkeypatch.setattr(InterpreterProfile, "measures_steps", True)
    monkeypatch.setattr(DraftPhases, "passed", in_turns(4, 2))
    shapes = [GraphShape(size, size) for size in (1, 2, 4, 8)] + [GraphShape(24, 8)]
    monkeypatch.setattr(InterpreterProfile, "graph_shapes", lambda *_: shapes)
    source = ModelSource.open(str(model), dtype="float32", drafts=True)
    config = CPU.model_copy(update={"device": "cuda", "speculate": how})
    found = answers(source, config, 9)
    assert found.tokens == expected.tokens
    assert found.ahead > 2
    assert found.left_out > 2
    assert found.drafts.accepted[0] > 3
    assert found.drafts.accepted[1] > 0
