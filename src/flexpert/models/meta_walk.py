"""One forward pass without weights: only what follows from tokens and positions alone has values.

The model is on the meta device, so that its activations have shapes and nothing else. Models also
compute with positions and look at the result (which frequencies, is this a packed batch?); that
part happens on the CPU, as it would while serving. Where the two meet, the values are dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flexpert.models.draft_layer import draft_layer, draft_logits, draft_states
from flexpert.models.meta_kernels import with_meta_kernels


class MetaWalk(TorchFunctionMode):
    """While it is entered, operations may mix tensors of the CPU with such of the meta device.

    touched: names of the parameters and buffers that were part of an operation.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {
            id(tensor): name
            for tensors in (model.named_parameters, model.named_buffers)
            for name, tensor in tensors(remove_duplicate=False)
        }
        self.touched: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        tensors = list(_tensors((args, given)))
        self.touched.update(name for one in tensors if (name := self._names.get(id(one))))
        if given.get("device") is not None and func in _COUNTING and _whole(func, given):
            given["device"] = "cpu"  # a mask, or positions, made in the forward pass
        if len({one.device.type for one in tensors}) > 1:
            args, given = _on_meta(args), _on_meta(given)
        if func is functional.embedding and args[1].is_meta:
            return args[1][args[0]]  # the only kernel in Python that most models would need
        return with_meta_kernels(lambda: func(*args, **given))


_COUNTING: Final = (torch.arange, torch.zeros, torch.ones, torch.full)


def _whole(func: Callable[..., Any], given: Mapping[str, Any]) -> bool:
    """Whether a factory makes whole numbers."""
    dtype = given.get("dtype", torch.int64 if func is torch.arange else None)
    return dtype in (int, bool) or (isinstance(dtype, torch.dtype) and not dtype.is_floating_point)


def walk(model: PreTrainedModel) -> set[str]:
    """Compute two tokens as a step of serving does.

    Returns the names of the parameters and buffers that had a part in it.
    """
    mode = MetaWalk(model)
    positions = torch.arange(2, device="cpu")
    tokens = torch.zeros_like(positions)
    drafts = draft_layer(model)
    with torch.inference_mode(), mode, _no_stream_captures(), _kept_masks(model) as masks:
        model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        if drafts is not None:
            like = drafts.enorm.get_parameter("weight")
            states = like.new_empty((1, 2, like.shape[0]))
            found = draft_states(model, tokens, positions, states, masks[-1])
            draft_logits(model, found)
    return mode.touched


@contextlib.contextmanager
def _kept_masks(model: PreTrainedModel) -> Iterator[list[object]]:
    """Those that the layers get while it is entered, which the draft layer gets as well."""
    masks: list[object] = []
    if draft_layer(model) is None:
        yield masks
        return
    decoder: Any = model.get_decoder()

    def keep(_module: nn.Module, _args: object, given: dict[str, object]) -> None:
        masks.append(given.get("attention_mask"))

    hook = decoder.layers[-1].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield masks
    finally:
        hook.remove()


@contextlib.contextmanager
def _no_stream_captures() -> Iterator[None]:
    """While it is entered, torch says without asking that no CUDA graph is captured.

    Models ask whether they are traced, and to ask a stream opens the GPU: the fork server, which
    probes the model, could then make no more ranks.
    """
    asked = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = asked


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_like(value, device="meta")
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(map(_on_meta, value)) if not hasattr(value, "_fields") else value
    if isinstance(value, dict):
        return {name: _on_meta(one) for name, one in value.items()}
    return value
