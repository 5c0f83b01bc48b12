"""What the signals that end a process ask for: to finish first, or to end at once (pure)."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Who ends a job tells all its processes, and its script may tell them once more.
_SAME_REQUEST_S = 2.0


class StopRequest:
    """The signals that one process got.

    asked: to stop, there was one. at_once: there was another: Ctrl-C at any time, or SIGTERM later
    than two seconds after the first.
    """

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False
        self._since = 0.0

    def on_signal(self, number: int, now: float) -> None:
        """now: in seconds of any clock that does not go back."""
        if not self.asked:
            self.asked, self._since = True, now
        elif number != signal.SIGTERM or now - self._since > _SAME_REQUEST_S:
            self.at_once = True
