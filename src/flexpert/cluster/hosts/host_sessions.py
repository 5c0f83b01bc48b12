"""The head's side of ranks that join from outside.

A session is one agent's: from its `Join` until its rank is gone. The coordinator knows a rank of an
agent as any other; what differs is how its process is started, ended and seen to be lost. Lost is
whoever is silent for the timeout. Its id is free at once: what its process may still do reaches
nobody, since its session is fenced, and its peers write down whom they hear (see `comm`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import msgspec

from flexpert.cluster.hosts import agent_protocol as say
from flexpert.cluster.hosts.byte_pipe import BytePipe
from flexpert.cluster.hosts.cluster_token import ClusterKeys
from flexpert.cluster.hosts.curve_socket import CurveListener, NotSentError, pieces
from flexpert.cluster.hosts.model_description import differences
from flexpert.cluster.saved_state import SavedHost
from flexpert.cluster.views import HostView
from flexpert.errors import OperationConflict, OperationRefused
from flexpert.forking.framing import WrongProtocol
from flexpert.version import VERSION

log = logging.getLogger("flexpert")

_TICKS = 8  # in one timeout
_MOST_NAME = 200
_LOG_EVERY_S = 10.0  # of refusals that anybody can cause
_NOTHING_SAID = say.FreeMemory(0)


class SessionOwner(Protocol):
    """The head, as far as sessions need it."""

    def free_id(self, wanted: int) -> int | None:
        """An id for a rank from outside, the wanted one if it is free; None: there is none."""

    def busy(self) -> bool:
        """Whether a change could not begin now."""

    def begin_operation(
        self, *, join: tuple[int, ...] = (), remove: tuple[int, ...] = ()
    ) -> object:
        """Raises: OperationConflict, OperationRefused"""

    def is_member(self, rank: int) -> bool:
        """Whether it is of the current epoch."""

    def rank_left_host(self, rank: int, status: int, why: str) -> None:
        """Its process is gone, or given up."""

    def save_hosts(self, records: list[SavedHost]) -> None:
        """Those that have a rank, for another head."""


@dataclass(slots=True, eq=False)
class _Expected:
    """An agent that the owner has had started, for a rank of a change that has begun already.

    end: the rank's end of its connection to the head.
    """

    rank: int
    verdicts: bytes
    end: socket.socket


@dataclass(slots=True, eq=False)
class _Session:
    """free: of its host. wants: what a change is still to be begun for: "join",
    "leave" or "". ticket: of an agent that was expected. expected: its rank, until that is
    started. taken: its rank is one of the head before; `peer` is b"" until the host is back, and
    until `attached` what comes of the rank was meant for that head. end: see `attach`."""

    number: bytes
    peer: bytes
    rank: int
    host: str
    heard: float
    free: say.FreeMemory = _NOTHING_SAID
    wants: str = ""
    ticket: bytes = b""
    expected: _Expected | None = None
    pipe: BytePipe | None = None
    gone: tuple[int, str] | None = None  # how the rank's process ended
    taken: bool = False
    attached: bool = True
    end: socket.socket | None = None

    @property
    def has_rank(self) -> bool:
        return self.pipe is not None or self.taken


class HostSessions:
    """Used on the head's event loop.

    address: where agents join.
    """

    def __init__(
        self,
        address: str,
        keys: ClusterKeys,
        owner: SessionOwner,
        *,
        settings: str,
        model: Mapping[str, str],
        timeout_s: float,
        orphan_s: float = 0.0,
        known: Sequence[SavedHost] = (),
    ) -> None:
        """
        Args:
            settings: for agents, as JSON. model: see `describe_model`.
            timeout_s: silence until an agent is lost.
            orphan_s: see `Welcome`. known: hosts of the head before.

        Raises: ConfigError: it cannot listen there.
        """
        self._owner = owner
        self._settings = settings
        self._model = model
        self._timeout_s = timeout_s
        self._orphan_s = orphan_s
        self._sessions: dict[bytes, _Session] = {}  # by number
        self._refused: Counter[str] = Counter()
        self._expected: dict[bytes, _Expected] = {}  # by ticket
        self._refusals_logged = float("-inf")
        self._loop = asyncio.get_running_loop()
        for one in known:
            session = _Session(one.session, b"", one.rank, one.host, self._loop.time(), one.free)
            session.taken, session.attached = True, False
            self._sessions[one.session] = session
        self._listener = CurveListener(
            address,
            keys,
            self._receive,
            partial(self._note_refusal, "had another cluster token"),
            partial(self._note_refusal, "came while too many had not shown a token"),
        )
        self.address = self._listener.address
        self._ticked = self._loop.time()
        self._task = self._loop.create_task(self._watch())

    # ---- for the head -----------------------------------------------------------------------

    def __contains__(self, rank: int) -> bool:
        return self._of(rank) is not None

    @property
    def ids(self) -> frozenset[int]:
        """Ids that agents have, or have been promised."""
        return frozenset(session.rank for session in self._sessions.values())

    @property
    def draining(self) -> frozenset[int]:
        """Ids whose agents have asked to leave, and wait for the change that runs."""
        return frozenset(s.rank for s in self._sessions.values() if s.wants == "leave")

    def free_memory(self) -> dict[int, say.FreeMemory]:
        """On the hosts of those that were told to join, by rank."""
        return {session.rank: session.free for session in self._sessions.values()}

    def views(self) -> list[HostView]:
        return [
            HostView(rank=session.rank, host=session.host)
            for session in sorted(self._sessions.values(), key=lambda session: session.rank)
        ]

    def spawn(self, rank: int, verdicts: bytes, end: socket.socket) -> None:
        """Have the agent start its rank.

        end: the rank's end of its connection to the head; closed here in any case.
        """
        session = self._of(rank)
        assert session is not None
        session.wants = ""
        self._connect(session, end)
        self._save()
        self._send(session, say.Spawn(session.number, verdicts))

    def attach(self, rank: int, end: socket.socket) -> None:
        """Have a host of the head before give its rank a new connection, when it is back.

        end: as of `spawn`.
        """
        session = self._of(rank)
        assert session is not None
        session.end = end
        if session.peer:
            self._reattach(session)

    def _reattach(self, session: _Session) -> None:
        end, session.end = session.end, None
        if end is not None:
            self._send(session, say.Reattach(session.number))
            self._connect(session, end)

    def expect(self, ticket: bytes, rank: int, verdicts: bytes, end: socket.socket) -> None:
        """An agent will join with this ticket, and is to start this rank as soon as it can.

        end: as of `spawn`.
        """
        self._expected[ticket] = _Expected(rank, verdicts, end)

    def give_up(self, ticket: bytes, why: str) -> None:
        """The agent with this ticket will not come, or is gone: a rank that it has is lost."""
        expected = self._expected.pop(ticket, None)
        if expected is not None:
            expected.end.close()
            self._owner.rank_left_host(expected.rank, 1, why)
        for session in [s for s in self._sessions.values() if s.ticket == ticket]:
            self._give_up(session, why)

    def _connect(self, session: _Session, end: socket.socket) -> None:
        session.pipe = BytePipe(
            end,
            partial(self._to_rank, session),
            partial(self._give_up, session, "it was cut off"),
        )

    def _to_rank(self, session: _Session, data: bytes) -> None:
        for piece in pieces(data):
            self._send(session, say.ToRank(session.number, piece))

    def kill(self, rank: int) -> None:
        """Give the rank up: whatever its host still says is not heard."""
        session = self._of(rank)
        if session is not None:
            self._loop.call_soon(self._give_up, session, "it was terminated")

    def close(self) -> None:
        """Idempotent."""
        for session in self._sessions.values():
            self._tell(session.peer, say.Fenced(session.number, "the service has stopped"))
        self.leave()

    def leave(self) -> None:
        """Hosts are told nothing: they wait for another head. Idempotent."""
        self._task.cancel()
        for session in self._sessions.values():
            if session.pipe:
                session.pipe.close()
            if session.end:
                session.end.close()
        self._sessions.clear()
        for expected in self._expected.values():
            expected.end.close()
        self._expected.clear()
        self._listener.close()

    # ---- what agents say --------------------------------------------------------------------

    def _receive(self, peer: bytes, message: bytes) -> None:
        try:
            heard = say.decode_to_head(message)
        except WrongProtocol as error:
            log.warning("an agent is turned away: %s", error)
            self._end_of(peer, str(error))
            self._tell(peer, say.Turned(str(error)))
            return
        except msgspec.MsgspecError as error:
            log.warning("an agent says what cannot be understood: %s", error)
            self._end_of(peer, "it says what cannot be understood")
            return
        if isinstance(heard, say.Join):
            self._join(peer, heard)
            return
        session = self._sessions.get(heard.session)
        if session is not None and not session.peer:
            log.info("host %s is back with rank %d", session.host, session.rank)
            session.peer = peer
            self._reattach(session)
        if session is None or session.peer != peer:
            self._tell(peer, say.Fenced(heard.session, "the session is over"))
            return
        session.heard = self._loop.time()
        match heard:
            case say.Opened(_, model, free):
                self._opened(session, model, free)
            case say.Reattached():
                session.attached = True
            case say.FromRank(_, data) if session.pipe is not None and session.attached:
                session.pipe.write(data)
            case say.RankGone(_, status, why) if session.gone is None:
                session.gone = (status, why[:_MOST_NAME])
                self._bury(session)
            case say.AskToLeave(_, now, why):
                # nobody has asked for fewer ranks if what starts agents has ended one
                if now or session.ticket:
                    self._give_up(session, _printable(why) or "it was stopped")
                elif not session.has_rank:
                    self._let_go(session, "it was stopped before it served")
                else:
                    session.wants = "leave"
                    self._begin(session)

    def _join(self, peer: bytes, join: say.Join) -> None:
        host = _printable(join.host)
        if join.version != VERSION:
            reason = f"it runs flexpert {join.version[:40]!a}, the head {VERSION}"
            log.warning("%s cannot join: %s", host, reason, extra={"host": host})
            self._tell(peer, say.Turned(reason))
            return
        self._end_of(peer, "it joins anew")
        expected = self._expected.pop(join.ticket, None) if join.ticket else None
        if join.ticket and expected is None:
            self._tell(peer, say.Turned("it is not expected any more"))
            return
        rank = expected.rank if expected else self._owner.free_id(join.rank)
        if rank is None:
            what = "no id is free" if join.rank < 0 else f"rank {join.rank} is there already"
            self._tell(peer, say.Turned(f"{what}; see --max-ranks and 'flexpert status'", True))
            return
        number = secrets.token_bytes(16)
        session = _Session(number, peer, rank, host, self._loop.time())
        session.ticket, session.expected = join.ticket, expected
        self._sessions[number] = session
        log.info("host %s will join as rank %d", host, rank, extra={"host": host, "rank": rank})
        welcome = say.Welcome(number, rank, self._settings, self._timeout_s, self._orphan_s)
        self._tell(peer, welcome)

    def _opened(self, session: _Session, model: Mapping[str, str], free: say.FreeMemory) -> None:
        different = differences(model, self._model)
        if different:
            self._turn(session, f"its model is another one than the head's: {different}")
            return
        session.free = free
        if session.expected is not None:
            expected, session.expected = session.expected, None
            self.spawn(expected.rank, expected.verdicts, expected.end)
        elif not session.has_rank:
            session.wants = "join"
            self._begin(session)

    def _begin(self, session: _Session) -> None:
        """The change that this session wants, if none runs."""
        if not session.wants or self._owner.busy():
            return
        wants, session.wants = session.wants, ""
        ids = (session.rank,)
        try:
            if wants == "join":
                self._owner.begin_operation(join=ids)
            else:
                self._owner.begin_operation(remove=ids)
        except OperationConflict:
            session.wants = wants
        except OperationRefused as error:
            if wants == "join":
                self._turn(session, str(error))
            else:
                self._let_go(session, f"it was stopped, and could not be drained: {error}")

    # ---- ends -------------------------------------------------------------------------------

    def _turn(self, session: _Session, reason: str) -> None:
        about = {"host": session.host, "rank": session.rank}
        log.warning(
            "host %s cannot join as rank %d: %s", session.host, session.rank, reason, extra=about
        )
        del self._sessions[session.number]
        self._tell(session.peer, say.Turned(reason))
        self._over(session, -9, f"host {session.host}: {reason}")

    def _bury(self, session: _Session) -> None:
        """The rank's process is gone; what it said before is heard first."""
        assert session.gone is not None
        if session.pipe is not None and not session.pipe.drained:
            self._loop.call_later(0.005, self._bury, session)
            return
        if self._sessions.pop(session.number, None) is None:
            return
        status, why = session.gone
        ended = say.Left(session.number) if status == 0 else None
        reason = why or f"its rank exited with status {status}"
        self._tell(session.peer, ended or say.Fenced(session.number, reason))
        self._over(session, status, why)

    def _give_up(self, session: _Session, why: str) -> None:
        if self._sessions.pop(session.number, None) is not None:
            self._tell(session.peer, say.Fenced(session.number, why))
            self._over(session, -9, f"host {session.host}: {why}")

    def _let_go(self, session: _Session, why: str) -> None:
        """It was asked to stop on its host, and no change can take it out: a loss to the service,
        whose requests go on elsewhere or wait; to its agent an end like any other."""
        del self._sessions[session.number]
        self._tell(session.peer, say.Left(session.number, why))
        self._over(session, -9, f"host {session.host}: {why}")

    def _end_of(self, peer: bytes, why: str) -> None:
        for session in [s for s in self._sessions.values() if s.peer == peer]:
            self._give_up(session, why)

    def _over(self, session: _Session, status: int, why: str) -> None:
        if session.expected is not None:
            session.expected.end.close()
            self._owner.rank_left_host(session.rank, 1, why)  # it was never started
        if session.has_rank:
            self._save()  # before it is known to be lost
            self._owner.rank_left_host(session.rank, status, why)
        if session.pipe is not None:
            session.pipe.close()
        if session.end is not None:
            session.end.close()

    def _save(self) -> None:
        self._owner.save_hosts(
            [
                SavedHost(session.number, session.rank, session.host, session.free)
                for session in self._sessions.values()
                if session.has_rank
            ]
        )

    async def _watch(self) -> None:
        every_s = self._timeout_s / _TICKS
        while True:
            await asyncio.sleep(every_s)
            now = self._loop.time()
            late, self._ticked = now - self._ticked > 2 * every_s, now
            for session in [one for one in self._sessions.values() if one.peer]:
                if late:  # the head was held up itself
                    session.heard = now
                if now - session.heard > self._timeout_s:
                    self._give_up(session, f"nothing was heard of it for {self._timeout_s:g} s")
                    continue
                serves = self._owner.is_member(session.rank)
                self._send(session, say.HeadBeat(session.number, serves))
                self._begin(session)

    # ---- sending ----------------------------------------------------------------------------

    def _send(self, session: _Session, message: say.ToAgent) -> None:
        try:
            self._listener.send(session.peer, say.encode(message))
        except NotSentError as error:
            self._loop.call_soon(self._give_up, session, f"it cannot be told anything: {error}")

    def _tell(self, peer: bytes, message: say.ToAgent) -> None:
        """What is of no use any more if it does not arrive."""
        try:
            self._listener.send(peer, say.encode(message))
        except NotSentError:
            return

    def _note_refusal(self, why: str) -> None:
        self._refused[why] += 1
        now = self._loop.time()
        if now - self._refusals_logged > _LOG_EVERY_S:
            self._refusals_logged = now
            for what, times in self._refused.items():
                log.warning("%d connections to %s %s: refused", times, self.address, what)
            self._refused.clear()

    def _of(self, rank: int) -> _Session | None:
        return next((s for s in self._sessions.values() if s.rank == rank), None)


def _printable(text: str) -> str:
    """What somebody else says, as it may be logged."""
    return "".join(character for character in text[:_MOST_NAME] if character.isprintable())
