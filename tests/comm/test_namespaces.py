"""Two machines with a cable that can be pulled: network namespaces, joined by a veth pair.

Each has two ranks, with shared memory between them and NIXL over TCP across. The test talks to
them through pipes, which no cable carries.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from support.comm_ranks import LIMIT_S
from support.waiting import wait_until

from flexpert.comm import Buffer, BufferSpec, CommError, ExpertTable

needs_nixl = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
    reason="pip install 'flexpert[nixl]' to test it",
)
pytestmark = [needs_nixl, pytest.mark.slow]

TIMEOUT_S = 1.0  # of the buffers: how long a silent peer is waited for
SLACK_S = 0.9  # for a busy machine; below another limit
SIDES = {"a": (0, 1), "b": (2, 3)}
ALL = (0, 1, 2, 3)
EXPERTS, TOKENS, TOPK = 12, 24, 4
SPEC = BufferSpec(4, TOKENS, 128, TOPK, torch.float32)
DEVICE = "fx0"
ADDRESS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def side_of(rank: int) -> str:
    return "a" if rank in SIDES["a"] else "b"


def far_from(rank: int) -> tuple[int, ...]:
    return SIDES["b" if side_of(rank) == "a" else "a"]


# ---- namespaces and processes -------------------------------------------------------------------


def ip(*args: str) -> str:
    done = subprocess.run(
        ["ip", *args],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


def delete(namespace: str) -> None:
    with contextlib.suppress(subprocess.SubprocessError, OSError):  # there may be none
        ip("netns", "delete", namespace)


class Process:
    """A process in a namespace, and the pipe to it."""

    def __init__(self, namespace: str) -> None:
        self.pipe, theirs = Pipe()
        self.process = start(namespace, theirs)
        theirs.close()

    def ask(self, task: Callable[..., Any], *args: Any) -> None:
        self.pipe.send((task, args))

    def answer(self) -> Any:
        if not self.pipe.poll(LIMIT_S):
            raise TimeoutError(f"no answer in {LIMIT_S} s")
        ok, value = self.pipe.recv()
        if not ok:
            raise value
        return value

    def end(self) -> None:
        self.process.kill()
        self.pipe.close()
        self.process.wait(LIMIT_S)


def start(namespace: str, pipe: Connection) -> subprocess.Popen[bytes]:
    rank = [sys.executable, "-m", "support.namespace_rank", str(pipe.fileno())]
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *rank],
        env={
            **os.environ,
            "UCX_TLS": "tcp",
            "UCX_NET_DEVICES": DEVICE,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        pass_fds=[pipe.fileno()],
        stdin=subprocess.DEVNULL,
    )


class Machines:
    """The two namespaces, the cable, and what runs there."""

    def __init__(self) -> None:
        name = f"flexpert-{secrets.token_hex(4)}"
        self.names = {side: f"{name}-{side}" for side in SIDES}
        self.processes: list[Process] = []
        self.ranks: dict[int, Process] = {}

    def set_up(self) -> None:
        """Raises: CalledProcessError, OSError: this system has no namespaces."""
        for name in self.names.values():
            ip("netns", "add", name)
        a, b = self.names.values()
        ip("-n", a, "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", b)
        for side, name in self.names.items():
            ip("-n", name, "address", "add", f"{ADDRESS[side]}/24", "dev", DEVICE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", DEVICE, "up")
            ip("netns", "exec", name, "true")

    def start(self) -> None:
        """A store in a, and two ranks on each side; they have not met yet."""
        store = self._start("a", "store", ADDRESS["a"])
        port = store.answer()
        for rank in ALL:
            machine = side_of(rank)
            options = {"machine": machine, "on_timeout": "mask", "timeout_s": TIMEOUT_S}
            self.ranks[rank] = self._start(machine, "rank", rank, SPEC, ADDRESS["a"], port, options)
        for process in self.ranks.values():
            process.answer()

    def _start(self, side: str, *what: Any) -> Process:
        process = Process(self.names[side])
        self.processes.append(process)
        process.pipe.send(what)
        return process

    def pull(self, side: str) -> float:
        """When it was done."""
        ip("-n", self.names[side], "link", "set", DEVICE, "down")
        return time.monotonic()

    def plug(self, side: str) -> None:
        """Returns when it carries: UCX does not start without a device that does."""
        ip("-n", self.names[side], "link", "set", DEVICE, "up")
        wait_until(
            lambda: all(
                ip("-n", name, "-br", "link", "show", DEVICE).split()[1] == "UP"
                for name in self.names.values()
            ),
            timeout_s=LIMIT_S,
        )

    def carried(self) -> int:
        """Bytes that have gone over the cable, both ways."""
        (told,) = json.loads(ip("-n", self.names["a"], "-s", "-j", "link", "show", DEVICE))
        return int(told["stats64"]["tx"]["bytes"]) + int(told["stats64"]["rx"]["bytes"])

    def all(self, task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        self.ask(task, *args)
        return self.answers()

    def ask(self, task: Callable[..., Any], *args: Any) -> None:
        for process in self.ranks.values():
            process.ask(task, *args)

    def answers(self) -> dict[int, Any]:
        return {rank: process.answer() for rank, process in self.ranks.items()}

    def close(self) -> None:
        with contextlib.ExitStack() as last:  # all of it, whatever fails, the processes first
            for name in self.names.values():
                last.callback(delete, name)
            for process in self.processes:
                last.callback(process.end)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need ip (Debian: iproute2)")
    made = Machines()
    try:
        try:
            made.set_up()
        except (subprocess.SubprocessError, OSError) as error:
            why = getattr(error, "stderr", None) or error
            pytest.skip(f"this system gives no network namespaces with a veth pair: {why}")
        made.start()
        yield made
    finally:
        made.close()


# ---- tasks of the ranks, and what must come out -------------------------------------------------


def meet(buffer: Buffer, ids: Iterable[int]) -> dict[int, str]:
    buffer.connect(ids, timeout_s=LIMIT_S)
    return {peer: buffer.channel(peer) for peer in buffer.connected}


def meet_in_vain(buffer: Buffer) -> tuple[float, str]:
    """The other side; seconds, and why it failed."""
    began = time.monotonic()
    try:
        buffer.connect(ALL)
    except CommError as error:
        return time.monotonic() - began, f"{type(error).__name__}: {error}"
    raise AssertionError("they came")


def take_in(buffer: Buffer, ids: Iterable[int]) -> tuple[int, ...]:
    buffer.unmask(ids)
    return buffer.active


def part(buffer: Buffer) -> float:
    """From the other side; seconds."""
    began = time.monotonic()
    buffer.disconnect(far_from(buffer.rank))
    return time.monotonic() - began


def exchange(
    buffer: Buffer, seed: int, timeout_s: float = TIMEOUT_S, waits: list[float] | None = None
) -> set[int]:
    """Returns the ranks whose results are missing; adds the seconds of both halves to waits.

    Expert e is on rank e mod 4 and gives (e + 1) · x. All numbers are small multiples of 1/8, so
    that sums are exact in any order; what is right can be computed here.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + buffer.rank)
    x = torch.randint(-64, 65, (TOKENS, SPEC.hidden), generator=generator).float()
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOPK]
    weights = torch.randint(1, 9, (TOKENS, TOPK), generator=generator) / 8
    expert = torch.arange(EXPERTS, dtype=torch.int32)
    table = ExpertTable(expert % len(ALL), expert // len(ALL), EXPERTS // len(ALL))

    began = time.monotonic()
    got = buffer.dispatch(x, chosen, weights, table, timeout_s=timeout_s)
    slot = torch.repeat_interleave(torch.arange(table.slots), torch.diff(got.offsets.long()))
    mine = slot * len(ALL) + buffer.rank
    y = got.x * (mine + 1)[:, None]
    middle = time.monotonic()
    out = buffer.combine(y, got, timeout_s=timeout_s)
    if waits is not None:
        waits += middle - began, time.monotonic() - middle

    missing = buffer.missing_results(got)
    lost = torch.zeros(TOKENS, TOPK, dtype=torch.bool) if missing is None else missing.choices
    right = ((weights * (chosen + 1)).masked_fill(lost, 0).sum(1, keepdim=True)) * x
    assert torch.equal(out, right)
    owners = set((chosen % len(ALL))[lost].tolist())
    if missing is None:
        return owners
    assert set(missing.ranks) == owners
    assert torch.equal(missing.weight, weights.masked_fill(~lost, 0).sum(1))
    for rank in got.masked:
        assert lost[chosen % len(ALL) == rank].all()
    return owners


def exchanges(buffer: Buffer, seeds: range, alone: bool) -> None:
    """Nothing is missing but what the other side would have given, if this one is alone."""
    far = set(far_from(buffer.rank)) if alone else set()
    assert set(buffer.active) == set(ALL) - far
    for seed in seeds:
        assert exchange(buffer, seed, LIMIT_S) == far
        seen = buffer.barrier(bytes([buffer.rank, seed]), timeout_s=LIMIT_S)
        assert seen == {rank: bytes([rank, seed]) for rank in buffer.active}


def exchanges_until_cut_off(buffer: Buffer, seed: int) -> tuple[float, float]:
    """Until this side knows that it is alone; when this rank did, and its longest wait."""
    far = set(far_from(buffer.rank))
    when, waits = 0.0, [0.0]
    for number in range(100_000):
        assert exchange(buffer, seed + number, waits=waits) <= far
        alone = not far & set(buffer.active)
        began = time.monotonic()
        seen = buffer.barrier(bytes([alone]), timeout_s=TIMEOUT_S)
        now = time.monotonic()
        waits.append(now - began)
        assert set(ALL) - far <= set(buffer.active), "the neighbour was masked, too"
        if not when and not far & set(buffer.active):
            when = now
        if set(seen.values()) == {bytes([True])}:
            return when, max(waits)
    raise AssertionError("nobody was cut off")


def cut_off_at_once(buffer: Buffer, seed: int) -> tuple[float, float]:
    """The cable was pulled before; seconds of dispatch and combine."""
    far = set(far_from(buffer.rank))
    waits: list[float] = []
    assert exchange(buffer, seed, waits=waits) == far
    assert set(buffer.active) == set(ALL) - far
    return waits[0], waits[1]


# ---- tests --------------------------------------------------------------------------------------


def come_together(machines: Machines) -> None:
    for rank, channels in machines.all(meet, ALL).items():
        far = far_from(rank)
        assert channels == {
            peer: "self" if peer == rank else "nixl" if peer in far else "shm" for peer in ALL
        }
    assert set(machines.all(take_in, ALL).values()) == {ALL}
    before = machines.carried()
    machines.all(exchanges, range(20), False)
    # rows and results of nearly every token go to the other side, and neither by another way
    assert machines.carried() - before > 20 * len(ALL) * TOKENS * SPEC.hidden * 4 * 2


def test_each_side_goes_on_alone_when_the_cable_is_pulled(machines: Machines) -> None:
    """In the middle of exchanges; they part, and meet again when it is back."""
    come_together(machines)
    machines.ask(exchanges_until_cut_off, 1000)
    time.sleep(0.1)
    pulled = machines.pull("b")
    for when, longest in machines.answers().values():
        # one far peer may fall silent in a wait, the other in the next
        assert when - pulled < 2 * TIMEOUT_S + SLACK_S
        assert longest < TIMEOUT_S + SLACK_S
    machines.all(exchanges, range(20, 40), True)
    assert max(machines.all(part).values()) < SLACK_S
    machines.all(exchanges, range(40, 60), True)

    for rank, (took, why) in machines.all(meet_in_vain).items():
        assert took < TIMEOUT_S + 1.0 + SLACK_S  # the store has a second more
        if side_of(rank) == "a":
            assert why.startswith("RankTimeout: rank 2, 3 did not answer in connect")
        else:
            assert why.startswith("CommError: the store gave no answer")
    machines.all(exchanges, range(60, 80), True)
    machines.plug("b")
    come_together(machines)


def test_ranks_cut_off_at_rest_unmask_each_other_when_the_cable_is_back(
    machines: Machines,
) -> None:
    """Over the connections they had; twice, with either end pulled."""
    come_together(machines)
    for number, side in enumerate(SIDES):
        machines.pull(side)
        for dispatch_s, combine_s in machines.all(cut_off_at_once, 100 + number).values():
            assert TIMEOUT_S <= dispatch_s < TIMEOUT_S + SLACK_S
            assert combine_s < SLACK_S
        machines.all(exchanges, range(60, 80), True)
        machines.plug(side)
        assert set(machines.all(take_in, ALL).values()) == {ALL}
        machines.all(exchanges, range(80, 100), False)
