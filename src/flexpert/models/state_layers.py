"""Runs the layers of a model that keep a state, each sequence with its own.

A step's rows of several sequences lie in one batch, [1, N, hidden]. A layer that mixes rows along
the sequence must not see those of others: so its forward is called for each run of rows that
belong together ([1, n, hidden]), and for sequences that decode as a batch ([B, 1, hidden]).

Results of a row then depend on how its sequence was cut, through rounding. In deterministic mode
each row is computed alone, one after the other, so that they do not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.kernels.kernel_set import StateKernels
from flexpert.kernels.state_steps import StateRows
from flexpert.models import recording
from flexpert.models.deterministic import SingleRowMode
from flexpert.models.fused_states import StateFusion, is_right, state_fusion
from flexpert.models.kv_cache import KVCache
from flexpert.models.padding import pad_rows, padded_size
from flexpert.models.source import ModelInfo
from flexpert.models.state_runs import NO_STATE, StateRuns
from flexpert.models.state_view import CACHE, StateKey, StateShape, StateView, cache_position

Slots: TypeAlias = dict[StateKey, Tensor]
"""A layer's states by key: [slots, *shape]."""

_TRIAL_ROWS = 3

_DECODED_BYTES = 4 * 2**20
"""Of states in one call for sequences that decode: each of its many intermediate results is as
large as all of them, and larger ones neither stay in a processor's cache nor in malloc's hands.
With 2 MiB each, a step of 16 took 0.15 s in calls of 1 or 2 sequences, and 0.57 s in one call."""

DECODED_ON_GPU = 2**28
"""The same on a GPU, where it bounds what the intermediate results take of its memory."""


class StateLayer:
    """One layer with a state, in place of its module's forward.

    runs: of the batch that all layers compute; None: each row decodes. decodes: see
    `ForwardBatch.state_slots`. rows: the same for what computes all rows at once.
    """

    def __init__(
        self,
        module: nn.Module,
        shapes: Sequence[StateShape],
        slots: Slots,
        *,
        deterministic: bool,
        kernels: StateKernels | None = None,
    ) -> None:
        """kernels: None: torch's; on a GPU these need no padding and wait for nothing."""
        self.runs: StateRuns | None = None
        self.decodes: Tensor | None = None
        self.rows: StateRows | None = None
        self._call = _with_cache(module)
        self._slots = slots
        self._shapes = shapes
        self._dtypes = {shape.key: shape.dtype for shape in shapes}
        self._deterministic = deterministic
        self._kernels = kernels
        most = _DECODED_BYTES if kernels is None else DECODED_ON_GPU
        self._most = max(1, most // sum(shape.nbytes for shape in shapes))
        self.continues = True  # see `try_continuing`
        self.fused: StateFusion | None = None  # in place of the module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's, for hidden states of [1, N, hidden]; rows behind those of `runs` are
        padding."""
        if (noting := recording.current()) is not None:
            return noting.module(self.forward, (args, kwargs), lambda: self._of_fresh(args, kwargs))
        runs, decodes = self.runs, self.decodes
        if decodes is None:
            raise RuntimeError("a layer with a state outside of ModelRunner.forward")
        given = LayerArguments(args, kwargs)
        if self.fused is not None:
            assert self.rows is not None
            return self.fused(given.hidden[0], self._slots, self.rows).unsqueeze(0)
        together = 0 if self._deterministic else decodes.shape[1]
        pieces = self._decoded(given, decodes, runs) if together else []
        if runs is not None:
            for run in range(together, len(runs)):
                rows = slice(runs.begins[run], runs.begins[run + 1])
                pieces += self._run(given, rows, runs.sources[run], runs.targets[run])
        return _joined(pieces, given.count)

    def _of_fresh(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `forward` gives for one sequence that begins; no state is kept."""
        rows = LayerArguments(args, kwargs).count
        result = self._call(StateView(None, self._dtypes), args, kwargs)
        return _joined([_rows_of(result, (1, rows))], rows)

    def _decoded(self, given: LayerArguments, decodes: Tensor, runs: StateRuns | None) -> list[Any]:
        """Of all rows that decode, in pieces. decodes: [2, D] int64, slots that are read and
        written."""
        waves = [] if runs is None else runs.waves
        if len(waves) < 2:
            every = range(decodes.shape[1])
            return [self._decode(given, decodes, rows) for rows in self._cuts(every)]
        pieces = [self._decode(given, decodes, rows) for wave in waves for rows in self._cuts(wave)]
        order = torch.tensor([row for wave in waves for row in wave])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return [_in_order(pieces, back.to(decodes.device))]

    def _cuts(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """As many at a time as may be computed together."""
        return [rows[first : first + self._most] for first in range(0, len(rows), self._most)]

    def _decode(self, given: LayerArguments, decodes: Tensor, rows: Sequence[int]) -> Any:
        """Of some rows that decode, of different sequences. decodes: as for `_decoded`."""
        at: slice | list[int] = list(rows)
        if isinstance(rows, range):
            at = slice(rows.start, rows.stop)
        sources, targets = decodes[0, at], decodes[1, at]
        take, put = (self._kernels.take, self._kernels.put) if self._kernels else (_take, _put)
        view = StateView(
            {key: take(states, sources) for key, states in self._slots.items()}, self._dtypes
        )
        result = self._call(view, *given.apart(at))
        for key, states in self._slots.items():
            put(view.states[key], states, targets)
        return _rows_of(result, (len(rows), 1))

    def _run(self, given: LayerArguments, rows: slice, source: int, target: int) -> list[Any]:
        view = self._view(source)
        pieces = []
        for part in self._parts(rows, begins=source == NO_STATE):
            with SingleRowMode() if self._deterministic else contextlib.nullcontext():
                result = self._call(view, *given.cut(part))
            pieces.append(_rows_of(result, (1, part.stop - part.start)))
            view.go_on()
        for key, slots in self._slots.items():
            slots[target].copy_(view.states[key][0])
        return pieces

    def _view(self, source: int) -> StateView:
        if source == NO_STATE:
            return StateView(None, self._dtypes)
        return StateView(
            {key: slots[source : source + 1].clone() for key, slots in self._slots.items()},
            self._dtypes,
        )

    def _parts(self, rows: slice, *, begins: bool) -> list[slice]:
        """What one call computes."""
        if not self._deterministic and (begins or self.continues):
            return [rows]
        return [slice(row, row + 1) for row in range(rows.start, rows.stop)]

    def try_continuing(self, arguments: dict[str, Any]) -> bool:
        """Find out whether a call of several rows depends on each state before them.

        Some models' plain code (not their GPU kernels) begins a call of several rows anew; then
        such rows are to be computed one by one.

        Args:
            arguments: of a call, with hidden states of [1, N, hidden], N ≥ 2, anything.
        """
        fresh = StateView(None, self._dtypes)
        self._call(fresh, (), arguments)

        def after(states: dict[StateKey, Tensor]) -> list[Tensor]:
            view = StateView({key: state.clone() for key, state in states.items()}, self._dtypes)
            result = self._call(view, (), arguments)
            results = result if isinstance(result, tuple) else (result,)
            return [*results, *view.states.values()]

        usual = after(fresh.states)
        for key, state in fresh.states.items():
            other = after({**fresh.states, key: state + 1.0 + state.abs().amax()})
            if all(torch.equal(a, b) for a, b in zip(usual, other, strict=True)):
                return False
        return True

    def is_right(self, fused: StateFusion, arguments: dict[str, Any]) -> bool:
        """Whether that computes what the module does. arguments: as for `try_continuing`."""
        name, hidden = next(iter(arguments.items()))
        return is_right(
            fused,
            lambda view, rows: self._call(view, (), {**arguments, name: rows}),
            self._shapes,
            hidden,
        )


def _take(states: Tensor, slots: Tensor) -> Tensor:
    return states.index_select(0, slots)


def _put(new: Tensor, states: Tensor, slots: Tensor) -> None:
    states.index_copy_(0, slots, new)


def bind_states(
    model: PreTrainedModel,
    info: ModelInfo,
    names: Sequence[str],
    kv: KVCache,
    *,
    deterministic: bool,
    pads_rows: bool,
    kernels: StateKernels | None,
) -> list[StateLayer]:
    """Let the modules of these names, which have their weights, find their states in `kv`.

    pads_rows: their linear layers compute few numbers of rows; see `padding`. kernels: of a GPU,
    whose states begin as zeros, since steps that warm it up read them; None: torch's.
    """
    layers = []
    continues: dict[type[nn.Module], bool] = {}
    right: dict[type[nn.Module], bool] = {}
    for name, shapes, slots in zip(names, info.states, kv.states, strict=True):
        module = model.get_submodule(name)
        layer = StateLayer(module, shapes, slots, deterministic=deterministic, kernels=kernels)
        if type(module) not in continues:
            arguments = _trial_arguments(module, info)
            continues[type(module)] = layer.try_continuing(arguments)
        layer.continues = continues[type(module)]
        for states in slots.values() if kernels is not None else ():
            states.zero_()
        fused = None if kernels is None else state_fusion(module, shapes, kernels)
        if fused is not None:
            if type(module) not in right:
                right[type(module)] = layer.is_right(fused, arguments)
            if right[type(module)]:
                layer.fused = fused
        vars(module)["forward"] = layer.forward
        if pads_rows:
            _pad_linear_layers(module)
        layers.append(layer)
    return layers


def _pad_linear_layers(module: nn.Module) -> None:
    """A run may have any number of rows, and a state does not bear padding; products do."""
    for child in module.modules():
        if type(child) is nn.Linear:
            vars(child)["forward"] = _padded(child.forward)


def _padded(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        wanted = padded_size(rows)
        if wanted == rows:
            return forward(x)
        y = forward(pad_rows(x.reshape(rows, x.shape[-1]), wanted))
        return y[:rows].view(*x.shape[:-1], y.shape[-1])

    return call


def _trial_arguments(module: nn.Module, info: ModelInfo) -> dict[str, Any]:
    """Of a call with a few rows, and nothing else."""
    hidden, *others = inspect.signature(module.forward).parameters.values()
    needed = {
        one.name: None
        for one in others
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    }
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((1, _TRIAL_ROWS, info.hidden), generator=generator)
    device = next(module.parameters()).device
    return {hidden.name: rows.to(device, info.dtype), **needed}


class LayerArguments:
    """The arguments of a layer's forward, cut along the rows.

    hidden: the hidden states, [1, N, hidden]. count: N.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._args = args
        self._kwargs = kwargs
        self.hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self.count: int = self.hidden.shape[1]

    def cut(self, rows: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of some rows: [1, n, …], at addresses of their own: library products look at these."""
        return self._each(lambda x: x[:, rows].clone(memory_format=torch.contiguous_format))

    def apart(self, rows: slice | list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of some rows, each a sequence of its own: [n, 1, …]."""
        return self._each(lambda x: x[0, rows].unsqueeze(1).contiguous())

    def _each(self, change: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (1, self.count)
        return (
            tuple(_map(one, change, shape) for one in self._args),
            {name: _map(one, change, shape) for name, one in self._kwargs.items()},
        )


def _map(value: Any, change: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Any:
    """Changes the tensors in a value that have a row for each token, [*shape, …]."""
    if isinstance(value, Tensor):
        return change(value) if value.shape[:2] == shape else value
    if isinstance(value, tuple | list):
        return tuple(_map(one, change, shape) for one in value)
    return value


def _rows_of(result: Any, shape: tuple[int, int]) -> Any:
    """A result of [*shape, …] as [rows, …]; None in place of what has no row for each token, such
    as a state that some layers return as well."""
    if isinstance(result, tuple | list):
        return tuple(_rows_of(one, shape) for one in result)
    if isinstance(result, Tensor) and result.shape[:2] == shape:
        return result.flatten(0, 1)
    return None


def _joined(pieces: list[Any], rows: int) -> Any:
    """What `_rows_of` made of each run as the result of one call, [1, rows, …]; zeros behind."""
    if isinstance(pieces[0], tuple):
        return tuple(_joined(list(parts), rows) for parts in zip(*pieces, strict=True))
    if any(piece is None for piece in pieces):
        return None
    whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return pad_rows(whole, rows).unsqueeze(0)


def _in_order(pieces: list[Any], order: Tensor) -> Any:
    """What `_rows_of` made of several calls as that of one. order: of each row, which of all of
    theirs it is."""
    if isinstance(pieces[0], tuple):
        return tuple(_in_order(list(parts), order) for parts in zip(*pieces, strict=True))
    return None if pieces[0] is None else torch.cat(pieces).index_select(0, order)


def _with_cache(module: nn.Module) -> Callable[..., Any]:
    """(view, args, kwargs) → what the module computes with a view as its cache."""
    forward = module.forward
    at = cache_position(module)

    def call(view: StateView, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > at:
            return forward(*args[:at], view, *args[at + 1 :], **kwargs)
        return forward(*args, **{**kwargs, CACHE: view})

    return call
