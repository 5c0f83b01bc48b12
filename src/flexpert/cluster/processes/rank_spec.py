"""What a new rank is told."""

from __future__ import annotations

import msgspec

ENTRY = "flexpert.cluster.processes.rank_process:rank_main"


class RankSpec(msgspec.Struct, frozen=True):
    """config: the settings tree as JSON.

    verdicts: what an earlier rank found of the model's modules, encoded; b"": there is none.
    spare: it is to be warm when it says hello. several_machines: ranks of others may join.
    """

    rank: int
    config: str
    verdicts: bytes = b""
    spare: bool = False
    several_machines: bool = False


encode_spec = msgspec.msgpack.encode
decode_spec = msgspec.msgpack.Decoder(RankSpec).decode
