"""What an agent on another host and the head say to each other: msgspec structs, one a message.

    agent                            head
    Join                  →          refuses, or gives it an id and a session
                          ←          Welcome
    opens the model, starts its fork server
    Opened                →          a change begins that adds the id
                          ←          Spawn
    starts the rank; FromRank ⇄ ToRank: the bytes between the rank and the head
    AskToLeave            →          a change begins that removes it
    RankGone              →          its process is gone
                          ←          Left, Fenced: the session is over

Where another head may take the ranks over, the session goes on with that one, which knows its
number from the head before:

    any                   →          the host is back
                          ←          Reattach
    gives the rank a new connection
    Reattached            →          from here on FromRank is of that

All but `Join` name the session. One that is over is answered with `Fenced`, so that whatever a
host says that was given up is heard by nobody. Before each message come two bytes, the version of
the protocol (`framing.PROTOCOL`).
"""

from __future__ import annotations

import msgspec

from flexpert.forking.framing import PROTOCOL, check_protocol


class Join(msgspec.Struct, frozen=True, tag="join"):
    """rank: the id it wants, or had before; -1: any. host: its name, for people. ticket: of an
    agent that the head has had started, for the rank for which that was; b"": of any other."""

    version: str
    rank: int
    host: str
    ticket: bytes = b""


class FreeMemory(msgspec.Struct, frozen=True):
    """Bytes that a rank may take on a host, and of the GPU that it would have there; None: it has
    none, or nothing says how much is free."""

    host: int
    device: int | None = None


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The model is there. model: see `describe_model`."""

    session: bytes
    model: dict[str, str]
    free: FreeMemory


class FromRank(msgspec.Struct, frozen=True, tag="from_rank"):
    session: bytes
    data: bytes


class RankGone(msgspec.Struct, frozen=True, tag="rank_gone"):
    """The rank's process is certainly gone. status: exit code, or minus the signal."""

    session: bytes
    status: int
    why: str = ""


class AgentBeat(msgspec.Struct, frozen=True, tag="agent_beat"):
    session: bytes


class AskToLeave(msgspec.Struct, frozen=True, tag="leave"):
    """Drain this rank and let it go. now: it does not wait, its process is gone. why: a reason
    for that which the head does not know."""

    session: bytes
    now: bool = False
    why: str = ""


class Reattached(msgspec.Struct, frozen=True, tag="reattached"):
    session: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """settings: the tree as JSON. timeout_s: silence until either side takes the other for
    lost. orphan_s: a rank waits so long for another head; 0: it ends with this one."""

    session: bytes
    rank: int
    settings: str
    timeout_s: float
    orphan_s: float = 0.0


class Spawn(msgspec.Struct, frozen=True, tag="spawn"):
    """verdicts: see `RankSpec`."""

    session: bytes
    verdicts: bytes


class ToRank(msgspec.Struct, frozen=True, tag="to_rank"):
    session: bytes
    data: bytes


class Reattach(msgspec.Struct, frozen=True, tag="reattach"):
    """From another head than the one before: what `ToRank` brings is of a new connection."""

    session: bytes


class HeadBeat(msgspec.Struct, frozen=True, tag="head_beat"):
    """serves: the rank is of the current epoch."""

    session: bytes
    serves: bool = False


class Turned(msgspec.Struct, frozen=True, tag="turned"):
    """It cannot join. again: it may later."""

    reason: str
    again: bool = False


class Left(msgspec.Struct, frozen=True, tag="left"):
    """The rank has left; there is nothing more to do. reason: why it was not by a change, for
    people; "": it was."""

    session: bytes
    reason: str = ""


class Fenced(msgspec.Struct, frozen=True, tag="fenced"):
    """The session is over: its rank is to be ended, and what it says is not heard."""

    session: bytes
    reason: str


ToHead = Join | Opened | FromRank | RankGone | AgentBeat | AskToLeave | Reattached
ToAgent = Welcome | Spawn | ToRank | HeadBeat | Turned | Left | Fenced | Reattach

_VERSION = 2  # bytes
_encode = msgspec.msgpack.Encoder().encode
_to_head = msgspec.msgpack.Decoder(ToHead).decode
_to_agent = msgspec.msgpack.Decoder(ToAgent).decode


def encode(message: ToHead | ToAgent) -> bytes:
    """As it travels."""
    return PROTOCOL.to_bytes(_VERSION, "little") + _encode(message)


def decode_to_head(data: bytes) -> ToHead:
    """Raises: WrongProtocol, msgspec.MsgspecError"""
    heard: ToHead = _to_head(_content(data))
    return heard


def decode_to_agent(data: bytes) -> ToAgent:
    """Raises: WrongProtocol, msgspec.MsgspecError"""
    heard: ToAgent = _to_agent(_content(data))
    return heard


def _content(data: bytes) -> memoryview:
    check_protocol(int.from_bytes(data[:_VERSION], "little"))
    return memoryview(data)[_VERSION:]
