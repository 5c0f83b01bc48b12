"""What the libraries that are measured listen on."""

from __future__ import annotations

import os


def keep_to_loopback() -> None:
    """For this process, before they are loaded: ranks of a measurement are on one machine.

    gloo would listen on the address of the host's name, UCX below NIXL on every interface. Who
    wants another sets the variables: what they say stays.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
