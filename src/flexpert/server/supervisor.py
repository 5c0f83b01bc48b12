"""What a supervisor that speaks as systemd does (`Type=notify`) is told of this process."""

from __future__ import annotations

import contextlib
import os
import socket


def tell_supervisor(*facts: str) -> None:
    """As sd_notify(3) has them; nothing where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract one
        address = "\0" + address[1:]
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel,
    ):
        channel.sendto("\n".join(facts).encode(), address)
