"""What a demonstration has seen so far, and what it comes to (pure)."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from flexpert.bench.load import ClientAnswer
from flexpert.bench.machine import Machine
from flexpert.cluster.views import ClusterView, OperationView

_RATE_WINDOW_S = 1.5


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """requests: different ones. duration_s: least time of traffic. many: ten changes, not three."""

    clients: int = 8
    requests: int = 32
    max_tokens: int = 64
    duration_s: float = 20.0
    many: bool = False


@dataclass(slots=True)
class DemoChange:
    """A change as its client sees it; times are `perf_counter` seconds."""

    began: float
    ended: float | None = None
    operation: OperationView | None = None
    error: str | None = None


@dataclass(slots=True)
class DemoProgress:
    """The run so far. sent: requests of the traffic; equal: answers as in the undisturbed run."""

    stage: str = ""
    model: str = ""
    cluster: ClusterView | None = None
    sent: int = 0
    answered: int = 0
    lost: int = 0
    equal: int = 0
    tokens: int = 0
    changes: list[DemoChange] = field(default_factory=list)
    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def tick(self, now: float) -> None:
        """Remember how many tokens there were, for the rate."""
        self._seen.append((now, self.tokens))
        while now - self._seen[0][0] > _RATE_WINDOW_S and len(self._seen) > 2:
            self._seen.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Lately."""
        if len(self._seen) < 2:
            return 0.0
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        return (after - before) / (now - then) if now > then else 0.0


class Gaps(msgspec.Struct, frozen=True):
    """Between two tokens of a stream. None if there was none."""

    count: int
    median_ms: float | None
    longest_ms: float | None


class ChangeResult(msgspec.Struct, frozen=True, kw_only=True):
    """began_s: after the start of the traffic. gaps: those that any of its time fell into."""

    began_s: float
    seconds: float
    operation: OperationView | None
    error: str | None
    gaps: Gaps


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert demo`.

    steady: the gaps outside of all changes. sample: an answer, the one of the most different words.
    """

    good: bool
    model: str
    machine: Machine
    clients: int
    duration_s: float
    sent: int
    answered: int
    lost: int
    equal: int
    output_tokens: int
    output_tokens_per_s: float
    steady: Gaps
    changes: list[ChangeResult]
    errors: list[str]
    sample_prompt: str
    sample: str


def demo_result(
    plan: DemoPlan,
    machine: Machine,
    progress: DemoProgress,
    answers: Sequence[tuple[int, ClientAnswer]],
    prompts: Sequence[str],
    began: float,
) -> DemoResult:
    """What the run comes to.

    Args:
        answers: each with the number of its request.
        prompts: in the order of those numbers.
        began: when the traffic began.
    """
    ended = max((answer.ended for _, answer in answers), default=began)
    windows = [(c.began, c.ended if c.ended is not None else ended) for c in progress.changes]
    steady, during = sort_gaps([answer.times for _, answer in answers], windows)
    changes = [
        ChangeResult(
            began_s=round(window[0] - began, 3),
            seconds=round(window[1] - window[0], 3),
            operation=change.operation,
            error=change.error or (change.operation.error if change.operation else None),
            gaps=measure(gaps),
        )
        for change, window, gaps in zip(progress.changes, windows, during, strict=True)
    ]
    tokens = sum(answer.tokens for _, answer in answers)
    changed = all(c.operation is not None and c.operation.state == "done" for c in changes)
    whole = [(place, answer.text) for place, answer in answers if answer.whole]
    number, sample = max(whole, key=lambda item: len(set(item[1].split())), default=(0, ""))
    return DemoResult(
        good=changed and bool(changes) and progress.lost == 0 and progress.equal == progress.sent,
        model=progress.model,
        machine=machine,
        clients=plan.clients,
        duration_s=ended - began,
        sent=progress.sent,
        answered=progress.answered,
        lost=progress.lost,
        equal=progress.equal,
        output_tokens=tokens,
        output_tokens_per_s=tokens / (ended - began) if ended > began else 0.0,
        steady=measure(steady),
        changes=changes,
        errors=list(dict.fromkeys(a.error for _, a in answers if a.error is not None))[:5],
        sample_prompt=prompts[number],
        sample=sample,
    )


def sort_gaps(
    streams: Iterable[Sequence[float]], windows: Sequence[tuple[float, float]]
) -> tuple[list[float], list[list[float]]]:
    """The gaps in seconds outside of all windows, and those that overlap each window."""
    steady: list[float] = []
    during: list[list[float]] = [[] for _ in windows]
    for times in streams:
        for before, after in itertools.pairwise(times):
            inside = False
            for found, (begin, end) in zip(during, windows, strict=True):
                if before < end and after > begin:
                    found.append(after - before)
                    inside = True
            if not inside:
                steady.append(after - before)
    return steady, during


def measure(gaps_s: Sequence[float]) -> Gaps:
    """Median and longest, in milliseconds."""
    if not gaps_s:
        return Gaps(0, None, None)
    median = statistics.median(gaps_s) * 1e3
    return Gaps(len(gaps_s), round(median, 2), round(max(gaps_s) * 1e3, 2))
