"""Numbers of a recorded step as functions of how many rows and samples it has.

What a model computes is the same list for any batch; only sizes, strides and offsets change, and
they are linear: a + b · rows + c · samples. So a few recordings of small batches tell all of them,
and another one whether that is so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexpert.errors import UnsupportedModel

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Affine:
    """base + per_row · rows + per_sample · samples."""

    base: int
    per_row: int = 0
    per_sample: int = 0

    def at(self, rows: int, samples: int) -> int:
        return self.base + self.per_row * rows + self.per_sample * samples

    def __add__(self, other: Affine) -> Affine:
        return Affine(
            self.base + other.base,
            self.per_row + other.per_row,
            self.per_sample + other.per_sample,
        )

    def __mul__(self, factor: int) -> Affine:
        return Affine(self.base * factor, self.per_row * factor, self.per_sample * factor)

    @property
    def fixed(self) -> int | None:
        """Its value, if that is the same for every batch."""
        return None if self.per_row or self.per_sample else self.base


def product(a: Affine, b: Affine) -> Affine | None:
    """None: it is not affine."""
    if (factor := b.fixed) is not None:
        return a * factor
    if (factor := a.fixed) is not None:
        return b * factor
    return None


def fit(takes: dict[tuple[int, int], T]) -> T:
    """What takes of batches of (rows, samples) have in common, with `Affine` in place of integers.

    Args:
        takes: values of dataclasses, tuples, dicts and leaves; the first at (r, s), then at
            (r + 1, s), (r + 1, s + 1), and one or more to check.

    Raises:
        UnsupportedModel: they differ in something else, or an integer is not affine.
    """
    (origin, *_), taken = list(takes), list(takes.values())
    leaves = [list(_leaves(one)) for one in taken]
    if len({len(one) for one in leaves}) > 1:
        raise UnsupportedModel("it computes something else for another number of tokens")
    fitted = []
    for each in zip(*leaves, strict=True):
        first = each[0]
        if isinstance(first, int) and not isinstance(first, bool):
            fitted.append(_fit_integer(origin, list(takes), each))
        elif all(_same(one, first) for one in each[1:]):
            fitted.append(first)
        else:
            raise UnsupportedModel("it computes something else for another number of tokens")
    rest = iter(fitted)
    result: T = _rebuilt(taken[0], rest)
    return result


def _fit_integer(
    origin: tuple[int, int], sizes: Sequence[tuple[int, int]], values: Sequence[int]
) -> Affine:
    per_row, per_sample = values[1] - values[0], values[2] - values[1]
    base = values[0] - per_row * origin[0] - per_sample * origin[1]
    found = Affine(base, per_row, per_sample)
    if any(found.at(*size) != value for size, value in zip(sizes, values, strict=True)):
        raise UnsupportedModel("sizes in it do not grow evenly with the number of tokens")
    return found


def _leaves(value: Any) -> Iterator[Any]:
    for one in _parts(value):
        if one is value:
            yield value
        else:
            yield from _leaves(one)


def _parts(value: Any) -> Sequence[Any]:
    """What it consists of; itself, if it is a leaf."""
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, dict):
        return list(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return (value,)


def _rebuilt(value: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_rebuilt(one, leaves) for one in value)
    if isinstance(value, dict):
        return {name: _rebuilt(one, leaves) for name, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kind: Callable[..., Any] = type(value)
        return kind(*(_rebuilt(getattr(value, field.name), leaves) for field in fields(value)))
    return next(leaves)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
