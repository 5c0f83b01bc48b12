"""What the head and the process that talks to Ray say to each other: msgspec structs, one a frame.

Every request has an `RayAnswer` with its number; an `AgentEnded` comes by itself.
"""

from __future__ import annotations

import msgspec


class RayNode(msgspec.Struct, frozen=True, kw_only=True):
    """One that lives, as Ray knows it. id: Ray's, in hex. host: its name. free, total: amounts of
    resources ("CPU", "GPU", …)."""

    id: str
    host: str
    free: dict[str, float]
    total: dict[str, float]


class ConnectRay(msgspec.Struct, frozen=True, tag="connect"):
    """address: host:port of Ray's GCS, or "auto"."""

    number: int
    address: str


class LookAtNodes(msgspec.Struct, frozen=True, tag="look"):
    number: int


class StartAgent(msgspec.Struct, frozen=True, tag="start", kw_only=True):
    """One agent on one node.

    ticket: by which it is known here, and to the head when it joins. demand: resources.
    address: where it joins. token: the cluster's.
    """

    number: int
    ticket: bytes
    rank: int
    node: str
    demand: dict[str, float]
    address: str
    token: str


class StopAgent(msgspec.Struct, frozen=True, tag="stop"):
    """What Ray was asked for is given back; nothing, if it was already."""

    number: int
    ticket: bytes


class LeaveRay(msgspec.Struct, frozen=True, tag="leave"):
    """Give everything back and exit."""

    number: int


class RayAnswer(msgspec.Struct, frozen=True, tag="answer", kw_only=True):
    """error: why it was not done; "": it was. node_ip: of `ConnectRay`, of the node on which the
    head is. nodes: of `LookAtNodes`."""

    number: int
    error: str = ""
    node_ip: str = ""
    nodes: list[RayNode] = []


class AgentEnded(msgspec.Struct, frozen=True, tag="ended"):
    """Its process is gone, or has nothing more to do. why: for people."""

    ticket: bytes
    why: str


ToRay = ConnectRay | LookAtNodes | StartAgent | StopAgent | LeaveRay
FromRay = RayAnswer | AgentEnded

encode = msgspec.msgpack.Encoder().encode
decode_to_ray = msgspec.msgpack.Decoder(ToRay).decode
decode_from_ray = msgspec.msgpack.Decoder(FromRay).decode
