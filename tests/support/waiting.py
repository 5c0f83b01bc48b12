"""Waiting for a condition, instead of sleeping until it should hold."""

import inspect
import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], timeout_s: float = 30.0, interval_s: float = 0.01
) -> None:
    """Evaluate a condition again and again until it is true.

    For what other threads and processes bring about; within an event loop see
    `support.service.until`.

    Args:
        timeout_s: seconds after which it is given up.
        interval_s: seconds between two evaluations.

    Raises:
        AssertionError: it stayed false; the message has the condition's source.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            source = inspect.getsource(condition).strip()  # type: ignore[arg-type]
            raise AssertionError(f"not within {timeout_s} s: {source}")
        time.sleep(interval_s)
