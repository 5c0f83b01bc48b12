"""The cluster token: a secret that the head and all hosts that join share.

Two Curve25519 key pairs follow from it, the head's and the agents'. So who has the token can
connect, knows that the head is the head, and nobody else learns or says anything; the keys of a
connection are its own (CurveZMQ).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from flexpert.config import ClusterConfig
from flexpert.errors import ConfigError
from flexpert.reading import is_open_to_others, read_text

VARIABLE = "FLEXPERT_CLUSTER_TOKEN"
SHORTEST = 16
HOW = (
    "make one with: (umask 077; python -c 'import secrets; print(secrets.token_urlsafe(32))' > "
    "cluster.token), give every host the same file, and name it with --cluster-token-file or put "
    f"its line into {VARIABLE}"
)
_LONGEST_FILE = 64 * 2**10


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """Z85, as ZeroMQ takes them."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    head: CurveKeys
    agents: CurveKeys


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> str:
    """The first line of the file, else the environment's; "" if there is neither.

    Raises: ConfigError: it cannot be read, others can read the file, or it is too short.
    """
    if file is None:
        token, where = environment.get(VARIABLE, "").strip(), VARIABLE
        if not token:
            return ""
    else:
        where = f"cluster token file {str(file)!r}"
        lines = read_text(file, "cluster.cluster_token_file", most=_LONGEST_FILE).splitlines()
        token = lines[0].strip() if lines else ""
        if is_open_to_others(file.stat()):
            raise ConfigError(f"{where} is open to other users: chmod 600 {file}")
    if len(token) < SHORTEST:
        raise ConfigError(f"{where} has a token of {len(token)} characters, fewer than {SHORTEST}")
    return token


def cluster_keys(config: ClusterConfig) -> ClusterKeys | None:
    """Of a head that hosts may join; None: none may.

    Raises: ConfigError: there is no token, or none that can be used.
    """
    if config.join_listen is None:
        return None
    token = read_token(config.cluster_token_file)
    if not token:
        raise ConfigError(f"--join-listen needs a cluster token: {HOW}")
    return keys_of(token)


def keys_of(token: str) -> ClusterKeys:
    """The key pairs that follow from a token."""
    return ClusterKeys(_pair(token, b"flexpert-head"), _pair(token, b"flexpert-agent"))


def _pair(token: str, who: bytes) -> CurveKeys:
    digest = hashlib.blake2b(token.encode(), digest_size=32, person=who).digest()
    secret = z85.encode(digest)
    return CurveKeys(zmq.curve_public(secret), secret)
