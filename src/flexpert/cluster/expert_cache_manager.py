"""Starts the host's copy of the experts, and starts it again when its process ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
import psutil

from flexpert.cluster.interfaces import Timer
from flexpert.cluster.processes.expert_cache_messages import (
    ENTRY,
    CacheFailed,
    CacheFilled,
    CacheOpened,
    CacheSpec,
    decode_report,
)
from flexpert.cluster.processes.helper import Helper, OnEnd, OnMessage
from flexpert.cluster.served_model import ServedModel
from flexpert.config import Config
from flexpert.device_settings import DEVICE_SETTINGS
from flexpert.errors import FlexpertError

log = logging.getLogger("flexpert")

SHARE = 0.5
"""Of the memory that is available: a copy that needs more is not made unless it is asked for."""

_AGAIN_S = 30.0


class CacheOwner(Protocol):
    """The head, as far as it matters here."""

    def start_helper(
        self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd
    ) -> Helper: ...
    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer: ...


def cache_bytes(config: Config, model: ServedModel, available: int) -> int:
    """Bytes of experts to keep in memory of the host; 0: none.

    available: bytes of the host's memory that are free.
    """
    device = DEVICE_SETTINGS[config.engine.device]
    if device.uses_host_memory or config.cluster.max_ranks == 1:
        return 0  # what peers hold is in memory of the host, or there is nobody to lose
    whole = model.all_experts
    desired = config.cluster.expert_cache
    if desired is not None:
        return min(desired, whole)
    return whole if whole <= SHARE * available else 0


class ExpertCacheManager:
    """On the event loop of the head.

    address: of the copy, for ranks; b"": there is none. filled: it has all that it will hold.
    """

    def __init__(self, config: Config, model: ServedModel, owner: CacheOwner) -> None:
        self.address = b""
        self.filled = False
        self._config = config
        self._model = model
        self._owner = owner
        self._helper: Helper | None = None
        self._timer: Timer | None = None
        self._closed = False

    def start(self) -> None:
        """Have it made in the background, if the settings and the memory are so."""
        self._timer = None
        available = psutil.virtual_memory().available
        most_bytes = cache_bytes(self._config, self._model, available)
        if most_bytes == 0 or self._closed:
            return
        spec = msgspec.msgpack.encode(CacheSpec(most_bytes))
        try:
            self._helper = self._owner.start_helper(ENTRY, spec, self._on_message, self._on_end)
        except (OSError, FlexpertError) as error:
            self._again(str(error))

    def close(self) -> None:
        """It ends with the service."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        if self._helper:
            self._helper.kill()

    def _on_message(self, message: bytes) -> None:
        match decode_report(message):
            case CacheOpened(address, nbytes):
                self.address = address
                size = f"{nbytes / 2**20:,.0f} MiB"
                log.info("%s of experts are copied into the host's memory", size)
            case CacheFilled(experts):
                self.filled = True
                log.info("%d experts are in the host's memory", experts)
            case CacheFailed(error):
                log.warning("the copy of the experts in the host's memory is not whole: %s", error)

    def _on_end(self, why: str) -> None:
        self._helper, self.address, self.filled = None, b"", False
        if not self._closed:
            self._again(why)

    def _again(self, why: str) -> None:
        log.warning("the copy of the experts in the host's memory ended: %s", why)
        self._timer = self._owner.call_later(_AGAIN_S, self.start)
