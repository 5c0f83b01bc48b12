"""A head without ranks: answers are a fixed function of prompt, seed and position."""

from __future__ import annotations

import asyncio
import math
import pkgutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexpert.cluster.handover.succession import Succession
from flexpert.cluster.listeners import Listeners
from flexpert.cluster.processes.transport import ChildLink
from flexpert.cluster.sequence_trace import SequenceTrace
from flexpert.cluster.views import (
    BalanceView,
    ChangePreview,
    ClusterEvent,
    ClusterView,
    Delta,
    LayerPlacement,
    LiveLoad,
    OperationView,
    PlacementView,
    RankView,
    Readiness,
    RebalanceView,
    ServiceState,
)
from flexpert.config import Config
from flexpert.engine.request import SamplingParams, TokenLogprobs
from flexpert.errors import (
    FlexpertError,
    OperationConflict,
    OperationRefused,
    Overloaded,
    RequestError,
    ServiceStopped,
    UnknownOperation,
    context_overflow,
)
from flexpert.models.token_tables import TokenTables, token_tables

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for t in tools %}{{ t | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}]"
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}<think>{% endif %}{% endif %}"
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, a few merges, special tokens; ids beyond 256 are merges and specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("ð", "Ł")]
    pieces = [*alphabet, *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [AddedToken(name, special=True) for name in (END, "<|user|>", "<|assistant|>")]
    backend.add_special_tokens(specials)
    backend.add_tokens([AddedToken("héllo wörld", special=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Mixtral's: ▁ for spaces, bytes where a character is unknown."""
    words = ["▁", "▁the", "▁cat", "s", "é", "a", "b", "<s>", "</s>"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


class SpawnedHelper:
    """A helper as a process of its own, because there is no fork server."""

    def __init__(self, entry, spec, on_message, on_end) -> None:
        self._on_end = on_end
        self._link = ChildLink(on_message, self._ended)
        with self._link.child_end as end:
            self.process = subprocess.Popen(
                [sys.executable, __file__, entry, spec.hex(), str(end.fileno())],
                pass_fds=[end.fileno()],
            )

    def send_pieces(self, pieces: Sequence[bytes]) -> None:
        self._link.send_pieces(pieces)

    def kill(self) -> None:
        self.process.kill()

    def _ended(self, why: str) -> None:
        self.process.kill()
        self._on_end(why or f"status {self.process.wait()}")


def run_helper(entry: str, spec: str, descriptor: str) -> int:
    """What the helper's process does."""
    source = SimpleNamespace(tokenizer=byte_level_tokenizer)
    end = socket.socket(fileno=int(descriptor))
    status: int = pkgutil.resolve_name(entry)(bytes.fromhex(spec), end, source)
    return status


@dataclass(frozen=True)
class FakeInfo:
    name: str = "fake"
    vocab: int = 300
    max_model_len: int = 128
    eos_token_ids: tuple[int, ...] = ()


@dataclass
class Behaviour:
    """How the fake answers.

    answer: token ids of every answer, repeated; None: letters drawn from prompt, seed, position.
    gap_s: between two tokens. fail_after: tokens before a sequence fails. per_delta: tokens that
    come together. degraded_from: the token from which on experts are missing.
    """

    answer: list[int] | None = None
    gap_s: float = 0.0
    fail_after: int | None = None
    per_delta: int = 1
    degraded_from: int | None = None
    operation_s: float = 0.05
    operation_fails: bool = False


class FakeStream:
    def __init__(
        self,
        head: FakeHead,
        name: str,
        prompt: list[int],
        params: SamplingParams,
        trace: SequenceTrace | None = None,
    ) -> None:
        self.id = name
        self.enough = self.cancelled = False
        self._trace = trace
        if trace is not None:
            trace.open(time.monotonic(), len(prompt))
            trace.placed(0, time.monotonic(), 0, 0)
        self._head = head
        self._prompt = prompt
        self._params = params
        self._over = False
        self._listener = lambda item: None
        self._of_prompt = None
        top = params.prompt_logprobs
        if top is not None:
            self._of_prompt = [
                TokenLogprobs(-0.25, [token, 1][:top], [-0.25, -1.5][:top], 1)
                for token in prompt[1:]
            ]

    def cancel(self) -> None:
        if not self._over:
            self._over = self.cancelled = True
            self._tell_end("stop" if self.enough else "cancelled", 0)
            self._head.cancelled.append(self.id)
            self._head.running.discard(self.id)
            self._listener(None)

    def over(self) -> None:
        self._over = True

    def listen(self, listener) -> None:
        self._listener = listener
        self._telling = asyncio.ensure_future(self._tell(listener))

    async def _tell(self, listener) -> None:
        try:
            async for delta in self:
                listener(delta)
        except FlexpertError as error:
            listener(error)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        behaviour = self._head.behaviour
        limit = self._params.max_tokens or self._head.info.max_model_len - len(self._prompt)
        sent = 0
        while not self._over:
            await self._head.pause(behaviour.gap_s)
            if behaviour.fail_after is not None and sent >= behaviour.fail_after:
                self._tell_end("failed", sent, "rank 3 is gone")
                self._end()
                raise FlexpertError("rank 3 is gone")
            count = min(behaviour.per_delta, limit - sent)
            tokens = [self._token(sent + place) for place in range(count)]
            finish = "length" if sent + count >= limit else None
            for place, token in enumerate(tokens):
                ends = (*self._params.stop_token_ids, *self._head.info.eos_token_ids)
                if token in ends and not self._params.ignore_eos:
                    tokens, finish = tokens[: place + 1], "stop"
                    break
            if sent == 0 and self._trace is not None:
                self._trace.first_token(time.monotonic(), 0.0)
            sent += len(tokens)
            if finish is not None:
                self._tell_end(finish, sent)
                self._end()
            since = behaviour.degraded_from
            of_prompt, self._of_prompt = self._of_prompt, None
            yield Delta(
                prompt_logprobs=of_prompt,
                tokens=tokens,
                logprobs=self._logprobs(tokens),
                finish=finish,
                degraded=since is not None and sent > since,
            )
            if finish is not None:
                return

    def _tell_end(self, outcome: str, said: int, error: str = "") -> None:
        if self._trace is not None:
            self._trace.over(time.monotonic(), outcome, said, error)

    def _end(self) -> None:
        self._over = True
        self._head.running.discard(self.id)

    def _token(self, position: int) -> int:
        answer = self._head.behaviour.answer
        if answer is not None:
            return answer[position % len(answer)]
        seed = self._params.seed or 0
        letter = (sum(self._prompt) * 7 + seed * 31 + position * 13) % 26
        return self._head.tokenizer.convert_tokens_to_ids(chr(ord("a") + letter))

    def _logprobs(self, tokens: list[int]) -> list[TokenLogprobs] | None:
        if self._params.logprobs is None:
            return None
        top = range(self._params.logprobs)
        values = [-math.inf if rank == 3 else -0.5 - rank for rank in top]
        return [
            TokenLogprobs(-0.5, [(token + rank) % 256 for rank in top], values) for token in tokens
        ]


@dataclass
class FakeHead:
    config: Config = field(default_factory=Config)
    behaviour: Behaviour = field(default_factory=Behaviour)
    info: FakeInfo = field(default_factory=FakeInfo)
    fork_server: object = field(default=None, kw_only=True)  # it takes none over

    @property
    def tables(self) -> TokenTables | None:
        return None if self.tokenizer is None else token_tables(self.tokenizer)

    def open_tokenizer(self) -> Any:
        return self.tokenizer

    def __post_init__(self) -> None:
        self.model_name = "fake"
        self.tokenizer = byte_level_tokenizer()
        self.info = replace(self.info, eos_token_ids=(self.tokenizer.eos_token_id,))
        self.sampling_defaults: dict[str, object] = {}
        self.registry = CollectorRegistry()
        Counter("flexpert_tokens", "tokens", registry=self.registry)
        self.registries = [self.registry]
        self.on_failure = None
        self.submitted: list[tuple[str, list[int], SamplingParams]] = []
        self.running: set[str] = set()
        self.impaired: dict[str, str] = {}
        self.cancelled: list[str] = []
        self.serving = True
        self.full = False
        self.ranks = [0, 1]
        self.epoch = 1
        self.stops = 0
        self.opened = asyncio.Event()
        self.can_fork = asyncio.Event()
        self.can_fork.set()
        self.succession = Succession(self.config, self)
        self._stopped = asyncio.Event()
        self._operations: dict[str, OperationView] = {}
        self._over: dict[str, asyncio.Event] = {}
        self._asked: dict[str, tuple[object, ...]] = {}  # by the caller's own id
        self.down: str | None = None
        self.failure: FlexpertError | None = None
        self.listeners = Listeners()
        self._tasks: set[asyncio.Task[None]] = set()

    def as_new(self) -> None:
        """As after its construction, for the next test; who listens goes on."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        self._operations.clear()
        self._over.clear()
        self._asked.clear()
        self.listeners._kept.clear()
        self.behaviour = Behaviour()
        self.submitted.clear()
        self.cancelled.clear()
        self.ranks = [0, 1]
        self.serving = True
        self.full = False
        self.down = self.failure = None

    def measured(self):
        return (family for one in self.registries for family in one.collect())

    async def start(self, report=None) -> None:
        self.opened.set()
        if report:
            report("fake ranks are up")

    async def stop(self, drain_s: float = 0.0) -> None:
        self.serving = False
        if self._stopped.is_set():
            return
        deadline = time.monotonic() + drain_s
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._stopped.set()
        self.stops += 1

    async def pause(self, seconds: float) -> None:
        """Between two tokens; a head that has stopped fails its sequences."""
        if seconds == 0:
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
                raise ServiceStopped("the service is stopping")

    def submit(self, prompt, params, *, request_id=None, trace=None) -> FakeStream:
        if not self.serving:
            raise ServiceStopped("the service is stopping")
        if self.full:
            raise Overloaded("too many")
        if len(prompt) + (params.max_tokens or 1) > self.info.max_model_len:
            raise context_overflow(self.info.max_model_len, len(prompt), params.max_tokens or 1)
        name = request_id or f"seq-{len(self.submitted)}"
        self.submitted.append((name, prompt, params))
        self.running.add(name)
        return FakeStream(self, name, prompt, params, trace)

    def check_room(self, sequences: int) -> None:
        if self.full:
            raise Overloaded("too many")

    def start_helper(self, entry, spec, on_message, on_end) -> SpawnedHelper:
        return SpawnedHelper(entry, spec, on_message, on_end)

    # ---- the cluster ------------------------------------------------------------------------

    def cluster(self) -> ClusterView:
        ranks = [RankView(id=id, state="active", host="here", pid=1) for id in self.ranks]
        held = {str(id): 8 for id in self.ranks}
        placement = PlacementView(layers=4, experts=16, replicas=16, experts_per_rank=held)
        return ClusterView(
            epoch=self.epoch,
            model="fake",
            max_ranks=8,
            ranks=ranks,
            placement=placement,
            operation=self._running_operation(),
            desired=list(self.ranks),
            cursor=self.listeners.latest,
        )

    def _running_operation(self) -> OperationView | None:
        alive = [o for o in self._operations.values() if o.state in ("preparing", "committing")]
        return alive[0] if alive else None

    async def request_operation(self, **target) -> OperationView:
        return self.begin_operation(**target)

    async def preview_operation(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        rebalance: bool = False,
    ) -> ChangePreview:
        running = self._running_operation()
        if running is not None:
            raise OperationConflict(f"operation {running.id} is running")
        size = ranks if ranks is not None else len(self.ranks) + add - len(remove)
        size = len(self.ranks) if rebalance else size
        if size > 8:
            raise OperationRefused(f"{size} ranks exceed max_ranks 8")
        target = list(range(size))
        joining = [id for id in target if id not in self.ranks]
        return ChangePreview(
            target=target,
            add=joining,
            remove=[id for id in self.ranks if id not in target],
            moved_experts=8 * len(joining),
            moved_bytes=8000 * len(joining),
            experts_to_load=dict.fromkeys(joining, 8),
        )

    def rebalance(self, operation_id: str | None = None) -> OperationView:
        return self.begin_operation(ranks=len(self.ranks), operation_id=operation_id)

    def proposed_rebalance(self) -> RebalanceView:
        return RebalanceView(balance=BalanceView())

    def operations(self) -> list[OperationView]:
        return list(self._operations.values())

    def recent_events(self) -> list[ClusterEvent]:
        return self.listeners.recent()

    def live_load(self) -> LiveLoad:
        return LiveLoad(len(self.running), 0, len(self.ranks))

    def layer_placement(self, layer: int) -> LayerPlacement:
        if layer >= 4:
            raise RequestError(f"layer {layer}: there are MoE layers 0 to 3")
        held = {id: [e for e in range(16) if e % len(self.ranks) == id] for id in self.ranks}
        return LayerPlacement(epoch=self.epoch, layer=layer, layers=4, experts=16, held=held)

    def begin_operation(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        operation_id: str | None = None,
    ) -> OperationView:
        asked = (ranks, add, tuple(remove))
        if operation_id in self._asked:
            if self._asked[operation_id] != asked:
                raise OperationConflict(f"{operation_id} was asked for with another target")
            return self._operations[operation_id]
        size = ranks if ranks is not None else len(self.ranks) + add - len(remove)
        if size > 8:
            raise OperationRefused(f"{size} ranks exceed max_ranks 8")
        target = list(range(size))
        running = self._running_operation()
        if running is not None:
            if running.target == target:
                return running
            raise OperationConflict(f"operation {running.id} is running")
        if operation_id is not None:
            self._asked[operation_id] = asked
        operation = OperationView(
            id=operation_id or f"op-{len(self._operations) + 1}",
            state="preparing",
            target=target,
            add=[id for id in target if id not in self.ranks],
            remove=[id for id in self.ranks if id not in target],
            phase="load",
            progress=0.0,
            phases={},
            epoch=self.epoch,
        )
        self._operations[operation.id] = operation
        self._over[operation.id] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._run(operation.id))
        self._tasks.add(task)
        return operation

    async def _run(self, id: str) -> None:
        self._set(id, phase="load")
        await asyncio.sleep(self.behaviour.operation_s)
        if self._operations[id].state != "preparing":
            return
        if self.behaviour.operation_fails:
            self._set(id, state="failed", error="rank 2 ran out of memory")
        else:
            self.epoch += 1
            self.ranks = self._operations[id].target
            self._set(id, state="done", progress=1.0, pause_ms=3.0)

    def _set(self, id: str, **changes) -> None:
        view = msgspec.structs.replace(self._operations[id], **changes)
        self._operations[id] = view
        if view.state not in ("preparing", "committing"):
            self._over[id].set()
        event = ClusterEvent(kind="operation", time=1.0, data=msgspec.to_builtins(view))
        self.listeners.publish(event)

    def operation(self, id: str) -> OperationView:
        if id not in self._operations:
            raise UnknownOperation(f"there is no operation {id!r}")
        return self._operations[id]

    def cancel_operation(self, id: str) -> OperationView:
        if self.operation(id).state != "preparing":
            raise OperationConflict(f"operation {id} is over")
        self._set(id, state="cancelled")
        return self._operations[id]

    async def wait_operation(self, id: str) -> OperationView:
        await self._over[id].wait()
        return self._operations[id]

    @property
    def latest_request(self) -> OperationView | None:
        return next(reversed(self._operations.values()), None)

    def events(self, since: int | None = None) -> AsyncIterator[ClusterEvent]:
        return self.listeners.events(since)

    def check_cursor(self, since: int) -> None:
        self.listeners.check(since)

    @property
    def listening(self) -> int:
        return len(self.listeners)

    def readiness(self) -> Readiness:
        if self.failure is not None:
            return Readiness(live=False, ready=False, reason=str(self.failure), state="failed")
        if not self.serving:
            closed = "the service does not accept requests"
            return Readiness(ready=False, reason=closed, state="stopping")
        state: ServiceState = "ready" if self.down is None else "down"
        return Readiness(ready=self.down is None, reason=self.down, state=state)


if __name__ == "__main__":
    sys.exit(run_helper(*sys.argv[1:]))
