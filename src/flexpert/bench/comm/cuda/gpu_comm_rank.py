"""One rank process of `flexpert bench comm --device cuda`, and its tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from flexpert.bench.comm.baseline import Unavailable
from flexpert.bench.comm.cuda.gpu_baselines import (
    CudaExchangeBaseline,
    GpuBaseline,
    GpuKind,
    GpuSite,
    eager_kinds,
    gpu_kinds,
)
from flexpert.bench.comm.cuda.timing import (
    EagerTimes,
    Shots,
    captured,
    copy_bandwidth,
    steady_times,
)
from flexpert.bench.comm.ranks import Settings, gather, wrong_result, wrong_rows
from flexpert.bench.comm.workload import (
    Input,
    Workload,
    expected_arrivals,
    expected_result,
    expert_results,
    make_input,
)
from flexpert.bench.gpu.gpu_device import set_rank_device

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

POOL = 4  # inputs in turn
STEADY = 16  # exchanges in one graph
EAGER = 64  # exchanges launched in a row: more launches than a queue takes would wait for it


class Phases(msgspec.Struct, frozen=True):
    """µs of one rank: dispatch and combine alone after a flush, and the pair in a steady run; or of
    the host for each call, and of the device for the pair, see `EagerTimes`."""

    dispatch: list[float]
    combine: list[float]
    pair: list[float]


class GpuRank:
    """The tasks. Baselines are built and closed by all ranks together."""

    def __init__(self, rank: int, ranks: int, store: Store, settings: Settings) -> None:
        self._rank, self._ranks, self._settings = rank, ranks, settings
        self._store = store
        self._baselines: dict[str, GpuBaseline] = {}
        self._built = self._gathered = 0
        self._clock: CudaExchangeBaseline | None = None
        self._device = set_rank_device(rank)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self._device)

    def device_index(self) -> int:
        return self._device.index

    def bandwidth(self) -> float:
        """Measured by rank 0 alone; 0 elsewhere."""
        return copy_bandwidth(self._device) if self._rank == 0 else 0.0

    def prepare(self, work: Workload) -> None:
        """Forget the last workload and make the inputs of this one."""
        for baseline in self._baselines.values():
            baseline.close()
        self._baselines.clear()
        if self._clock is not None:
            self._clock.close()
        torch.cuda.empty_cache()
        self._work = work
        self._inputs = [make_input(work, self._rank, turn) for turn in range(POOL)]
        self._pool = [
            Input(*(t.to(self._device) for t in (i.x, i.expert_ids, i.weights)))
            for i in self._inputs
        ]
        self._clock = CudaExchangeBaseline(self._site("clock"), fp8=False)

    def _site(self, name: str) -> GpuSite:
        self._built += 1
        return GpuSite(
            rank=self._rank,
            work=self._work,
            store=PrefixStore(f"{name}/{self._built}", self._store),
            gather=self._gather,
            fp8=self._settings.fp8,
            timeout_s=self._settings.timeout_s,
            pool=self._pool,
            device=self._device,
        )

    def _kind(self, name: str) -> GpuKind:
        kinds = (eager_kinds if self._settings.eager else gpu_kinds)(self._settings.fp8)
        return next(kind for kind in kinds if kind.name == name)

    def build(self, name: str) -> str:
        """Returns why the baseline cannot run here, or nothing."""
        try:
            self._baselines[name] = self._kind(name).make(self._site("baseline"))
        except Unavailable as error:
            return str(error)
        except RuntimeError as error:  # of a baseline's library; all ranks are told
            return f"failed: {error}"
        return ""

    def check(self, name: str, turn: int) -> str:
        """One exchange against the float64 oracle; returns what is wrong, or nothing."""
        baseline, work = self._baselines[name], self._work
        self._in_step()
        baseline.dispatch(turn)
        self._in_step()
        expected, slots = expected_arrivals(work, self._rank, turn)
        wrong = wrong_rows(baseline.rows().cpu(), expected, exact=self._kind(name).exact)
        y = expert_results(expected, slots)
        if not wrong:
            baseline.put_results(turn, y.to(self._device))
        self._in_step()
        result = baseline.combine(turn)
        self._in_step()
        i = self._inputs[turn]
        return wrong or wrong_result(result.cpu(), *expected_result(work, i))

    def measure(self, name: str, turns: int) -> Phases:
        """turns: replays of each graph. All ranks stay in step: some baselines need that."""
        baseline = self._baselines[name]
        for turn in range(POOL):  # compiles, before anything is captured
            baseline.dispatch(turn)
            self._in_step()
            baseline.combine(turn)
            self._in_step()

        def run() -> None:
            for turn in range(STEADY):
                baseline.dispatch(turn % POOL)
                baseline.combine(turn % POOL)

        steady = captured(run)
        assert self._clock is not None  # of `prepare`
        shots = Shots(self._clock.exchange.meet, self._device)
        phases = (baseline.dispatch, baseline.combine)
        self._in_step()
        shots.times(phases, POOL, 1)
        self._in_step()
        dispatch, combine = shots.times(phases, POOL, turns)
        self._in_step()
        steady_times(steady, STEADY, 2)
        self._in_step()
        pair = steady_times(steady, STEADY, turns)
        self._in_step()
        return Phases(dispatch, combine, pair)

    def measure_eager(self, name: str, rounds: int) -> Phases:
        """rounds: of `EAGER` exchanges each. All ranks begin each round together."""
        baseline = self._baselines[name]
        for turn in range(2 * POOL):  # compiles and prepares
            baseline.dispatch(turn % POOL)
            self._in_step()
            baseline.combine(turn % POOL)
            self._in_step()
        turns = [turn % POOL for turn in range(EAGER)]
        EagerTimes().add_round(baseline.dispatch, baseline.combine, turns)
        times = EagerTimes()
        for _ in range(rounds):
            self._in_step()
            times.add_round(baseline.dispatch, baseline.combine, turns)
        self._in_step()
        return Phases(times.dispatch, times.combine, times.pair)

    def _in_step(self) -> None:
        torch.cuda.synchronize()
        self._gather(None)

    def drop(self, name: str) -> None:
        """Close a baseline, so that the next has the memory."""
        baseline = self._baselines.pop(name, None)
        if baseline is not None:
            baseline.close()
        torch.cuda.empty_cache()

    def _gather(self, value: Any) -> list[Any]:
        self._gathered += 1
        key = f"gather/{self._gathered}"
        return gather(self._store, key, self._rank, self._ranks, value)
