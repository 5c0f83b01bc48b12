"""Loads of experts over time, made from a seed or read from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexpert.errors import ConfigError
from flexpert.moe.load_trace import load_windows

Trace = list[NDArray[np.float64]]  # windows of [layers, experts]

_TOPICS = 8
_DRIFT = 0.15  # of a window: the standard deviation of each expert's load, as a logarithm
_TOKENS = 4096  # for each expert, in a window


def _zipf(
    random: np.random.Generator, layers: int, experts: int, power: float
) -> NDArray[np.float64]:
    """[layers, experts], summing to 1; who is popular differs from layer to layer."""
    shares = np.arange(1, experts + 1) ** -power
    rows = np.array([random.permutation(shares) for _ in range(layers)])
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


def _counted(random: np.random.Generator, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """What so many tokens that choose by these shares come to."""
    shares = shares / shares.sum(axis=1, keepdims=True)
    return np.asarray(random.poisson(shares * _TOKENS * shares.shape[1]), dtype=np.float64)


def steady(power: float) -> Callable[[np.random.Generator, int, int, int], Trace]:
    """The same distribution in each window, counted anew: what differs is chance."""

    def trace(random: np.random.Generator, windows: int, layers: int, experts: int) -> Trace:
        shares = _zipf(random, layers, experts, power)
        return [_counted(random, shares) for _ in range(windows)]

    return trace


def drifting(random: np.random.Generator, windows: int, layers: int, experts: int) -> Trace:
    """Zipf 1.2 in the beginning; each expert's load changes by some 15 % from window to window."""
    shares = _zipf(random, layers, experts, 1.2)
    result = []
    for _ in range(windows):
        result.append(_counted(random, shares))
        shares = shares * np.exp(random.normal(0.0, _DRIFT, shares.shape))
    return result


def bursts(random: np.random.Generator, windows: int, layers: int, experts: int) -> Trace:
    """Eight topics, each with experts of its own (Zipf 1.2); one of them makes most of a window."""
    topics = [_zipf(random, layers, experts, 1.2) for _ in range(_TOPICS)]
    result = []
    for window in range(windows):
        parts = np.full(_TOPICS, 0.4 / _TOPICS)
        parts[window % _TOPICS] += 0.6
        mixed = sum(
            (part * topic for part, topic in zip(parts, topics, strict=True)), 0 * topics[0]
        )
        result.append(_counted(random, mixed))
    return result


TRACES: dict[str, Callable[[np.random.Generator, int, int, int], Trace]] = {
    "uniform": steady(0.0),
    "zipf 0.8": steady(0.8),
    "zipf 1.2": steady(1.2),
    "drifting": drifting,
    "bursts": bursts,
}


def recorded(path: Path) -> Trace:
    """Raises: ConfigError: it cannot be read, or has fewer than two windows."""
    try:
        with path.open("rb") as file:
            windows = [np.array(window.loads) for window in load_windows(file)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--trace {path}: {error}") from None
    if len(windows) < 2:
        raise ConfigError(f"--trace {path} has {len(windows)} windows, and two are needed")
    return windows
