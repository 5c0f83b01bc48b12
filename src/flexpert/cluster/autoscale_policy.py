"""How many ranks the load needs, by what clients were promised (pure).

A policy is a function of the goals, of what was seen (`Sample`, oldest first) and of the changes
that it led to. `decide` is the one that is used unless another is named:

- up at once, by as much as the worst goal is missed, or as the requests and the work that come
  will need by the time a rank has joined; a single bad interval must be bad by half to count;
- how many requests a second a rank takes is seen while requests wait: then it does what it can;
- down only when the smaller number would have held the work throughout `settle_s`, by what has
  been seen to hold: a number of ranks that missed a goal under such work is not tried again;
- a change that failed is not repeated at once, but after a time that doubles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import msgspec

_BAD_ONCE = 1.5  # times a goal, to act on one interval alone
_ROOM = 0.8  # of a goal, that a smaller number of ranks may be expected to use
_MOST_AT_ONCE = 2.0  # times today's ranks
_TREND = 6  # samples
_BUSY = 0.85  # of the requests that ranks can take, that may come before there are more ranks
_IDLE = 0.55  # the same on a smaller number, before that is gone down to
_FULL = 40  # intervals, at most, that tell how many requests a rank takes
_SEEN, _ENOUGH = 2, 8  # and at least; and requests that have ended
_COUNT, _MOST_LOOKS = 30, 40  # requests that tell a rate, or as many looks
_UNSURE, _SURE = 1.0, 2.5  # standard deviations that a rate may be off, and a trend must be above
_LIKE = 0.2  # loads that differ by less, on average, tell nothing of other loads
_JOIN_S, _JOINS = 2.0, 5  # how long ranks take to join until that was seen, and how often it counts


class Goals(msgspec.Struct, frozen=True, kw_only=True):
    """What the service is to keep to, and with how many ranks at least and at most.

    ttft_p99_s: from a request to its first token; itl_p99_s: between two tokens; each for 99 of a
    hundred. kv: share of the KV blocks in use. settle_s: for so long a smaller number must have
    been enough. every_s: between two looks.
    """

    min: int = 1
    max: int = 1
    ttft_p99_s: float | None = None
    itl_p99_s: float | None = None
    kv: float = 0.85
    settle_s: float = 30.0
    every_s: float = 2.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen in one interval. at: its end, in seconds.

    ranks: active ones. running, waiting: sequences at its end. kv_used: of the rank with the
    fullest cache, 0 to 1. ttft_p99_s, itl_p99_s: of the interval; None: there was none. ended,
    tokens: requests that did, and tokens of answers, in the interval; None: not known.
    """

    at: float
    ranks: int
    running: int
    waiting: int
    kv_used: float = 0.0
    ttft_p99_s: float | None = None
    itl_p99_s: float | None = None
    ended: int | None = None
    tokens: int | None = None

    @property
    def work(self) -> int:
        return self.running + self.waiting


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A change that was asked for. at: its end; took_s: from being asked for to there; grew: to
    more ranks."""

    at: float
    target: int
    done: bool
    took_s: float = 0.0
    grew: bool = True


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """ranks: how many there shall be. why: in words."""

    ranks: int
    why: str


Policy = Callable[[Goals, Sequence[Sample], Sequence[Attempt]], Decision]


def decide(goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> Decision:
    """See the module."""
    now = samples[-1]
    if now.ranks < 1:
        return Decision(ranks=max(goals.min, 1), why="no rank is up")
    bounded = min(max(now.ranks, goals.min), goals.max)
    if bounded != now.ranks:
        return _unless_failed(goals, Decision(ranks=bounded, why="the bounds"), now, attempts)
    need = _need(goals, samples, attempts)
    if need.ranks > now.ranks:
        return _unless_failed(goals, need, now, attempts)
    if need.ranks < now.ranks:
        return _settled(goals, samples, attempts, need)
    return need


def _need(goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> Decision:
    """The ranks that the latest sample calls for, within the bounds."""
    return _within(
        goals, [*_calls(goals, samples, attempts), _for_requests(goals, samples, attempts)]
    )


def _calls(goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> list[Decision]:
    """What latencies and the work call for."""
    return [
        *_missed(goals, samples),
        _for_work(goals, samples, attempts),
        _to_keep(goals, samples),
    ]


def _within(goals: Goals, calls: Sequence[Decision]) -> Decision:
    """The largest number, within the bounds."""
    most = max(calls, key=lambda call: call.ranks)
    return Decision(ranks=min(max(most.ranks, goals.min), goals.max), why=most.why)


def _shares(goals: Goals, sample: Sample) -> dict[str, tuple[float, str]]:
    """Goal → how much of it is used, and how that is told."""
    found = {}
    for name, seen, goal in (
        ("time to first token", sample.ttft_p99_s, goals.ttft_p99_s),
        ("time between tokens", sample.itl_p99_s, goals.itl_p99_s),
    ):
        if seen is not None and goal is not None:
            told = f"{name} {_ms(seen)} (p99), of at most {_ms(goal)}"
            found[name] = (seen / goal, told)
    found["kv"] = (sample.kv_used / goals.kv, f"{sample.kv_used:.0%} of the KV blocks in use")
    return found


def _of_these_ranks(samples: Sequence[Sample]) -> Sample:
    """The latest sample, without a time to the first token that began with fewer ranks."""
    now, since = samples[-1], -math.inf
    for before, after in itertools.pairwise(reversed(samples)):
        if after.ranks < now.ranks:
            since = before.at
            break
    if now.ttft_p99_s is None or now.at - now.ttft_p99_s >= since:
        return now
    return msgspec.structs.replace(now, ttft_p99_s=None)


def _missed(goals: Goals, samples: Sequence[Sample]) -> list[Decision]:
    """What goals that are missed call for.

    A request that waited from before there were so many ranks tells nothing of them.
    """
    now = _of_these_ranks(samples)
    before = samples[-2] if len(samples) > 1 and samples[-2].ranks == now.ranks else None
    earlier = {} if before is None else _shares(goals, before)
    calls = []
    for goal, (share, told) in _shares(goals, now).items():
        again = goal in earlier and earlier[goal][0] > 1
        if share > _BAD_ONCE or (share > 1 and again):
            ranks = math.ceil(now.ranks * min(share, _MOST_AT_ONCE))
            calls.append(Decision(ranks=max(now.ranks + 1, ranks), why=told))
    return calls


class _Interval(msgspec.Struct, frozen=True):
    """What happened between two looks. arrived, ended: requests. tokens: of answers. full: some
    requests waited all the time, so that ranks did what they can."""

    at: float
    seconds: float
    ranks: int
    arrived: int
    ended: int
    tokens: int
    full: bool


def _intervals(samples: Sequence[Sample]) -> list[_Interval]:
    return [
        _Interval(
            at=now.at,
            seconds=now.at - before.at,
            ranks=now.ranks,
            arrived=max(0, now.work - before.work + now.ended),
            ended=now.ended,
            tokens=now.tokens,
            full=before.waiting > 0 and now.waiting > 0 and before.ranks == now.ranks > 0,
        )
        for before, now in itertools.pairwise(samples)
        if now.ended is not None and now.tokens is not None and now.at > before.at
    ]


def _taken_per_rank(intervals: Sequence[_Interval]) -> float | None:
    """Requests a second that a rank answers when more wait; None: that was hardly seen yet.

    By its tokens: it makes them from the begin on, while the first of its requests ends later.
    """
    full = [one for one in intervals if one.full and one.tokens][-_FULL:]
    ended = sum(one.ended for one in intervals)
    if ended < _ENOUGH or len(full) < _SEEN:
        return None
    each = sum(one.tokens for one in intervals) / ended
    return sum(one.tokens for one in full) / sum(one.seconds * one.ranks for one in full) / each


def _latest(intervals: Sequence[_Interval], seconds: float) -> Sequence[_Interval]:
    """Those of so many seconds; more, where few requests came: what a handful says is chance."""
    count = arrived = 0
    for one in reversed(intervals[-_MOST_LOOKS:]):
        if one.at <= intervals[-1].at - seconds and arrived >= _COUNT:
            break
        count, arrived = count + 1, arrived + one.arrived
    return intervals[len(intervals) - count :]


def _rate(intervals: Sequence[_Interval], deviations: float) -> float:
    """Requests a second that came, and so many standard deviations of a Poisson process more."""
    arrived = sum(one.arrived for one in intervals)
    seconds = sum(one.seconds for one in intervals)
    return max(0.0, arrived + deviations * math.sqrt(arrived)) / seconds


def _with_trend(intervals: Sequence[_Interval], horizon_s: float) -> float:
    """Requests a second by then: as many as came at least, and more if there is a trend."""
    rate, seconds = _rate(intervals, 0.0), sum(one.seconds for one in intervals)
    middle = sum(one.at * one.seconds for one in intervals) / seconds
    spread = sum(one.seconds * (one.at - middle) ** 2 for one in intervals)
    least = _rate(intervals, -_UNSURE)
    if len(intervals) < 3 or not spread:
        return least
    moment = sum((one.arrived - rate * one.seconds) * (one.at - middle) for one in intervals)
    noise = math.sqrt(rate / spread)  # of a Poisson process that has no trend
    to_then = intervals[-1].at - middle + horizon_s
    return least + max(0.0, moment / spread - _SURE * noise) * to_then


def _for_requests(goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> Decision:
    """What the requests of the near future call for."""
    intervals = _intervals(samples)
    each = _taken_per_rank(intervals)
    if each is None:
        return Decision(ranks=1, why="little to do")
    horizon_s = _join_s(attempts) + goals.every_s
    lately = (intervals[-_TREND:], _latest(intervals, 0.0))
    return _to_take(max(_with_trend(one, horizon_s) for one in lately), each, _BUSY)


def _to_take(rate: float, each: float, share: float) -> Decision:
    """Ranks of which each takes `each` requests a second, and is to get this share of them."""
    why = f"{rate:.1f} requests a second, of which a rank takes {each:.1f}"
    return Decision(ranks=max(1, math.ceil(rate / (share * each) - 1e-9)), why=why)


def _for_work(goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt]) -> Decision:
    """What the work of the near future calls for, by what ranks have been seen to hold."""
    now = samples[-1]
    capacity = held_per_rank(goals, samples)
    expected = _expected_work(samples, attempts)
    if capacity is None or not expected:
        return Decision(ranks=1, why="little to do")
    ranks = math.ceil(expected / capacity - 1e-9)
    coming = f"{expected:.0f} requests" if expected > now.work else f"{now.work} requests"
    why = f"{coming}, of which a rank holds {capacity:.0f}"
    return Decision(ranks=min(ranks, math.ceil(now.ranks * _MOST_AT_ONCE)), why=why)


def _to_keep(goals: Goals, samples: Sequence[Sample]) -> Decision:
    """The fewest ranks on which, if they share all the work, no goal would be near."""
    now = samples[-1]
    if not now.work:
        return Decision(ranks=1, why="nothing to do")
    if now.waiting:
        return Decision(ranks=now.ranks, why=f"{now.waiting} requests wait")
    if (
        now.ttft_p99_s is not None
        and goals.ttft_p99_s is not None
        and now.ttft_p99_s > _ROOM * goals.ttft_p99_s
    ):
        return Decision(ranks=now.ranks, why=f"time to first token {_ms(now.ttft_p99_s)}")
    for ranks in range(1, now.ranks):
        gap_s = _gap_on(samples, ranks) if goals.itl_p99_s is not None else None
        slow = gap_s is not None and gap_s > _ROOM * (goals.itl_p99_s or math.inf)
        if not slow and now.kv_used * now.ranks / ranks <= _ROOM * goals.kv:
            told = "" if gap_s is None else f", with some {_ms(gap_s)} between tokens"
            return Decision(ranks=ranks, why=f"{now.work} requests{told}")
    return Decision(ranks=now.ranks, why=f"{now.work} requests")


def _gap_on(samples: Sequence[Sample], ranks: int) -> float | None:
    """The time between tokens to be expected if so many ranks share the work; None: unknown.

    A straight line through what was seen at other loads; where there was but one, in proportion.
    """
    now = samples[-1]
    if now.itl_p99_s is None:
        return None
    seen = [(s.work / s.ranks, s.itl_p99_s) for s in samples if s.ranks and s.itl_p99_s is not None]
    mean_load = sum(load for load, _ in seen) / len(seen)
    mean_gap = sum(gap for _, gap in seen) / len(seen)
    spread = sum((load - mean_load) ** 2 for load, _ in seen) / len(seen)
    if spread < (_LIKE * mean_load) ** 2:
        return now.itl_p99_s * now.ranks / ranks
    slope = sum((load - mean_load) * (gap - mean_gap) for load, gap in seen) / len(seen) / spread
    more = now.work / ranks - now.work / now.ranks
    return min(now.itl_p99_s + max(slope, 0.0) * more, now.itl_p99_s * now.ranks / ranks)


def held_per_rank(goals: Goals, samples: Sequence[Sample]) -> float | None:
    """Sequences a rank has been seen to hold within the goals; None: nothing was too much yet.

    Between what was held and what was too much the lower end counts; of what was too much, a
    quarter may have been bad luck, and all of it if as much was held twice as often.
    """
    shares = [max(share for share, _ in _shares(goals, sample).values()) for sample in samples]
    too_much = sorted(
        sample.work / sample.ranks
        for sample, share, before in zip(samples, shares, [0.0, *shares], strict=False)
        if sample.ranks and sample.work and (share > _BAD_ONCE or (share > 1 and before > 1))
    )
    if not too_much:
        return None
    limit = too_much[len(too_much) // 4]
    good = [
        sample.work / sample.ranks
        for sample, share in zip(samples, shares, strict=True)
        if sample.ranks and share <= 1
    ]
    if sum(load >= limit for load in good) >= 2 * len(too_much):
        return None
    return max([*(load for load in good if load < limit), limit * _ROOM])


def _expected_work(samples: Sequence[Sample], attempts: Sequence[Attempt]) -> float:
    """Sequences by the time a rank that is asked for now has joined, by the latest trend."""
    now = samples[-1]
    recent = samples[-_TREND:]
    if len(recent) < 3 or recent[-1].at <= recent[0].at:
        return float(now.work)
    horizon_s = _join_s(attempts)
    times = [sample.at - now.at for sample in recent]
    mean_time = sum(times) / len(times)
    mean_work = sum(sample.work for sample in recent) / len(recent)
    spread = sum((time - mean_time) ** 2 for time in times)
    slope = (
        sum(
            (time - mean_time) * (sample.work - mean_work)
            for time, sample in zip(times, recent, strict=True)
        )
        / spread
    )
    return min(max(float(now.work), now.work + slope * horizon_s), 2.0 * now.work)


def _join_s(attempts: Sequence[Attempt]) -> float:
    """How long ranks take to join, by the latest times."""
    joins = [attempt.took_s for attempt in attempts if attempt.done and attempt.grew][-_JOINS:]
    return sorted(joins)[len(joins) // 2] if joins else _JOIN_S


def _settled(
    goals: Goals, samples: Sequence[Sample], attempts: Sequence[Attempt], need: Decision
) -> Decision:
    """The smaller number that sufficed throughout the last `settle_s`, or that there are now."""
    now = samples[-1]
    window = [sample for sample in samples if sample.at > now.at - goals.settle_s]
    started = samples[0].at <= now.at - goals.settle_s
    steady = all(sample.ranks == now.ranks for sample in window)
    stay = Decision(ranks=now.ranks, why=f"{need.ranks} would do, but for how long? ({need.why})")
    if not (started and steady):
        return stay
    first = len(samples) - len(window)
    calls = [
        _within(goals, _calls(goals, samples[: first + n + 1], attempts))
        for n in range(len(window))
    ]
    intervals = _intervals(samples)
    each = _taken_per_rank(intervals)
    if each is not None:
        lately = _latest(intervals, goals.settle_s)
        calls.append(_to_take(_rate(lately, _UNSURE), each, _IDLE))
    enough = _within(goals, calls)
    if enough.ranks >= now.ranks:
        return stay
    why = f"{enough.ranks} would have done for {goals.settle_s:.0f} s: {enough.why}"
    return _unless_failed(goals, Decision(ranks=enough.ranks, why=why), now, attempts)


def _unless_failed(
    goals: Goals, wanted: Decision, now: Sample, attempts: Sequence[Attempt]
) -> Decision:
    """A change whose like has just failed waits: a rank that was lost meanwhile is no reason to
    wait for long, and what fails again and again is asked for ever more seldom."""
    failures = 0
    for attempt in reversed(attempts):
        if attempt.done:
            break
        failures += 1
    if failures:
        first_s = max(2 * goals.every_s, _join_s(attempts))
        left_s = attempts[-1].at + first_s * 2 ** min(failures - 1, 8) - now.at
        if left_s > 0:
            why = f"{wanted.ranks} are called for ({wanted.why}), but the last change failed"
            return Decision(ranks=now.ranks, why=f"{why}; again in {left_s:.0f} s")
    return wanted


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
