"""What a model computes between the two products of an expert, as a program of our kernels.

Every way in which a rank on a CPU computes experts takes the same one, so that a row has the same
bits whichever it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch import nn

from flexpert.errors import UnsupportedModel
from flexpert.kernels.affine import fit
from flexpert.kernels.cpu.program import DTYPES, MOST_BUFFERS, RowProgram
from flexpert.kernels.experts import Gate
from flexpert.models.recording import Recording
from flexpert.models.step_compiler import Place, compile_rows, is_contiguous

_TAKES: Final = ((5, 1), (6, 1), (6, 2), (9, 2))
"""See `fit`; the second numbers mean nothing here."""


def gate_programs(
    gates: Sequence[Gate], heights: Sequence[int], dtype: torch.dtype
) -> list[RowProgram | None]:
    """`gate_program` of each layer; those that are alike share one, which takes 4 ms to find."""
    found: dict[Hashable, RowProgram | None] = {}
    programs = []
    for index, (gate, height) in enumerate(zip(gates, heights, strict=True)):
        settings = _settings(gate)
        key = index if settings is None else (settings, height)
        if key not in found:
            found[key] = gate_program(gate, height, dtype)
        programs.append(found[key])
    return programs


def _settings(gate: object) -> Hashable | None:
    """What a gate computes depends on nothing else; None: that is not known."""
    if isinstance(gate, MethodType):
        own = _settings(gate.__self__)
        return None if own is None else (gate.__func__, own)
    if not isinstance(gate, nn.Module):
        return gate if isinstance(gate, FunctionType | BuiltinFunctionType) else None
    if any(one is not None for one in (*gate._parameters.values(), *gate._buffers.values())):
        return None
    inner = [(name, _settings(module)) for name, module in gate._modules.items() if module]
    if any(settings is None for _, settings in inner):
        return None
    plain = [
        (name, value if isinstance(value, _PLAIN) else id(value))
        for name, value in vars(gate).items()
        if isinstance(value, _PLAIN) or not name.startswith("_")
    ]
    return (type(gate), *inner, *plain)


_PLAIN: Final = (int, float, str, type(None))


def gate_program(gate: Gate, height: int, dtype: torch.dtype) -> RowProgram | None:
    """A gate of rows [rows, height] of `dtype`; None: it has operations without a kernel of ours,
    or what is recorded of it gives something else."""
    if dtype not in DTYPES or not dtype.is_floating_point:
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():
            return _recorded(gate, height, dtype)
    except (UnsupportedModel, RuntimeError, TypeError, ValueError):
        return None


def _recorded(gate: Gate, height: int, dtype: torch.dtype) -> RowProgram | None:
    dice = torch.Generator(device="cpu").manual_seed(height)
    takes: dict[tuple[int, int], Any] = {}
    for rows, more in _TAKES:
        x = torch.randn((rows, height), generator=dice, device="cpu").to(dtype)
        with Recording([x]) as recording:
            y = gate(x)
        takes[rows, more] = (
            tuple(recording.calls),
            tuple(recording.nbytes),
            recording.operand(y),
        )
    calls, nbytes, result = fit(takes)
    compiled = compile_rows(calls)
    place = Place.of(result)
    if (
        compiled is None
        or len(nbytes) > MOST_BUFFERS
        or result.buffer is None
        or result.buffer.base == 0
        or result.dtype != dtype
        or place.offset.fixed != 0
        or len(place.sizes) != 2
        or not is_contiguous(place)
    ):
        return None
    program = RowProgram(
        compiled.operations,
        nbytes,
        source=0,
        result=result.buffer.base,
        result_row=result.sizes[1].base,
        kept=compiled.kept,
    )
    x = 4 * torch.randn((7, height), generator=dice, device="cpu").to(dtype)
    close = torch.allclose(program(x).float(), gate(x).float(), rtol=0.02, atol=1e-5)
    return program if close else None
