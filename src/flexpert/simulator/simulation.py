"""A load and its events on a simulated service, from the first request to the last token (pure)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from flexpert.bench.load import ClientAnswer
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.prompts import random_prompts, read_prompts
from flexpert.bench.timed_events import TimedEvent
from flexpert.cluster.journal import Arrival
from flexpert.errors import ConfigError, FlexpertError
from flexpert.simulator.cost_profile import CostProfile
from flexpert.simulator.simulated_service import (
    OnStep,
    QueueSample,
    SimulatedChange,
    SimulatedService,
    SimulatedSettings,
    failed,
)
from flexpert.simulator.virtual_time import VirtualTime

_POOL = range(2, 1026)  # token ids of random prompts
_STUCK_S = 3600.0


@dataclass(slots=True)
class SimulationResult:
    """answers: times are seconds from the begin of the load, in the order of the requests.
    work_s: for how long a step ran."""

    answers: list[ClientAnswer]
    changes: list[SimulatedChange]
    samples: list[QueueSample]
    seconds: float
    steps: int
    work_s: float
    head_busy_s: float
    rank_seconds: float
    preemptions: int
    cached_tokens: int


def asked_of(load: OfferedLoad) -> Callable[[int], list[int]]:
    """The token ids of a request's prompt, made when it is asked for: those of a long trace fill
    the memory. Raises: ConfigError: a file of prompts holds texts."""
    if load.trace is not None:
        trace, blocks = load.trace, dict[int, list[int]]()
        return lambda number: trace.prompt(number, _POOL, load.seed, blocks)
    if load.prompts is not None:
        prompts = read_prompts(load.prompts, load.count)
        if any(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(
                f"--prompts {load.prompts}: a simulation has no tokenizer; give lists of token ids"
            )
    else:
        prompts = random_prompts(_POOL, load.input_tokens, load.count, load.seed)
    return lambda number: list(prompts[number])  # type: ignore[arg-type]


def fitting_load(load: OfferedLoad, most: int) -> OfferedLoad:
    """Without the requests of a trace that are longer. Raises: ConfigError: none is left."""
    if load.trace is not None:
        trace = load.trace.fitting(most)
        return replace(load, trace=trace, count=len(trace.requests))
    if load.prompts is None and load.input_tokens + load.output_tokens > most:
        raise ConfigError(
            f"requests of {load.input_tokens} and {load.output_tokens} tokens are longer than the "
            f"{most} that the service takes"
        )
    return load


@dataclass(slots=True)
class _Clients:
    """They ask, and note what comes."""

    service: SimulatedService
    prompt: Callable[[int], list[int]]
    tokens: Sequence[int]
    answers: dict[int, ClientAnswer] = field(default_factory=dict)
    open: int = 0
    queue: Iterator[int] = field(default_factory=lambda: iter(()))  # of clients without a pause

    def ask(self, number: int) -> None:
        now = self.service.time.now
        prompt, tokens = self.prompt(number), self.tokens[number]
        answer = ClientAnswer(now, tokens=tokens, prompt_tokens=len(prompt))
        self.answers[number] = answer
        self.open += 1

        def heard(arrival: Arrival) -> None:
            at = self.service.time.now
            error = failed(arrival)
            if error is not None or arrival is None:
                answer.error = str(error)
                self._over(answer, at)
                return
            assert not isinstance(arrival, FlexpertError)
            answer.times.extend([at] * len(arrival.tokens))
            answer.cached_tokens += arrival.cached
            if arrival.finish is not None:
                answer.finish = arrival.finish
                self._over(answer, at)

        self.service.submit(str(number), prompt, tokens, heard)

    def _over(self, answer: ClientAnswer, at: float) -> None:
        answer.ended = at
        self.open -= 1
        following = next(self.queue, None)
        if following is not None:
            self.service.time.after(0.0, lambda: self.ask(following))


def simulate(
    load: OfferedLoad,
    settings: SimulatedSettings,
    profile: CostProfile,
    *,
    events: Sequence[TimedEvent] = (),
    sample_s: float = 1.0,
    on_step: OnStep | None = None,
) -> SimulationResult:
    """Until all is answered and no change runs.

    Args:
        sample_s: between two samples of the queues.
        on_step: see `SimulatedService`.

    Raises:
        ConfigError: a request is longer than the service takes, or an event asks for more ranks
            than there may be.
        FlexpertError: nothing moves any more.
    """
    limits = settings.limits
    load = fitting_load(load, min(limits.max_model_len, limits.blocks * limits.block_size))
    for event in events:
        if (event.body or {}).get("ranks", 0) > settings.capacity:
            raise ConfigError(f"--event '{event.text}': there is room for {settings.capacity}")
    time = VirtualTime()
    service = SimulatedService(settings, profile, time)
    if on_step is not None:
        service.on_step = on_step
    clients = _Clients(service, asked_of(load), load.answer_tokens())
    arrivals = load.arrivals()
    if arrivals is not None:
        for number, at in enumerate(arrivals):
            time.at(at, partial(clients.ask, number))
    else:
        clients.queue = iter(range(min(load.concurrency, load.count), load.count))
        for number in range(min(load.concurrency, load.count)):
            time.at(0.0, partial(clients.ask, number))
    for event in events:
        time.at(event.at, partial(_happen, service, event))
    samples: list[QueueSample] = []
    moved = (0, 0.0)  # steps, and when there were so many

    def sample() -> None:
        nonlocal moved
        samples.append(service.look())
        if service.steps != moved[0] or not clients.open:
            moved = service.steps, time.now
        elif time.now - moved[1] > _STUCK_S:
            raise FlexpertError(
                f"{clients.open} requests are unfinished, and no step was taken for an hour"
            )
        time.after(sample_s, sample)

    sample()

    def enough() -> bool:
        asked_all = len(clients.answers) == load.count and not clients.open
        return asked_all and all(change.state != "running" for change in service.changes)

    time.run(enough)
    answers = [clients.answers[number] for number in range(load.count)]
    schedulers = [rank.scheduler for rank in service.ranks.values()]
    return SimulationResult(
        answers=answers,
        changes=service.changes,
        samples=samples,
        seconds=max((answer.ended for answer in answers), default=0.0),
        steps=service.steps,
        work_s=service.busy_s,
        head_busy_s=service.head_busy_s,
        rank_seconds=service.rank_seconds,
        preemptions=sum(scheduler.preemptions for scheduler in schedulers),
        cached_tokens=sum(answer.cached_tokens for answer in answers),
    )


def _happen(service: SimulatedService, event: TimedEvent) -> None:
    body = event.body or {}
    if event.killed is not None:
        service.kill(event.killed, event.text)
    elif "ranks" in body:
        service.scale(body["ranks"], event.text)
    elif body.get("remove"):
        service.remove(body["remove"], event.text)
    else:
        service.rebalance(event.text)
