"""What trials have found of a model's modules, as a plain value that other ranks can be given.

All ranks of a service load the same checkpoint with the same code on the same kind of device, so
what the first one finds holds for all. Whether a module has the form that a kernel needs is
checked on every rank, verdict or not; only the trial itself is spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar

import msgspec

if TYPE_CHECKING:
    from torch import nn

MOST_BYTES: Final = 2**16
"""Of encoded verdicts: they travel in one packet to the fork server, which holds 200 KiB."""


WeightsDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


class NormFusion(msgspec.Struct, frozen=True, tag="norm"):
    """early: see `kernels.cpu.ops.rms_norm`. shifted: one is added to the weight."""

    early: bool
    shifted: bool = False


class AttentionFusion(msgspec.Struct, frozen=True, tag="attention"):
    """early: of the norms of queries and keys. half: the module is given one angle for each pair
    of elements that it turns, not one for each element. The rest: what it passes to attention;
    sinks: as the name of its parameter."""

    early: bool
    half: bool = False
    scaling: float | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: str | None = None


class RouterFusion(msgspec.Struct, frozen=True, tag="router"):
    """normalised: the weights of a token add up to one. dtype: of these weights."""

    normalised: bool
    dtype: WeightsDtype


class LayerFusion(msgspec.Struct, frozen=True, tag="layer"):
    """Names of a decoder layer's modules: attention with its norm before it, and what has the
    experts, with that before it."""

    attention: str
    attention_norm: str
    experts: str
    experts_norm: str


class Verdict(msgspec.Struct, frozen=True):
    """fusion: what takes the module's place; None: nothing that we have computes the same.

    of: the class that was tried.
    """

    of: str
    fusion: NormFusion | AttentionFusion | RouterFusion | LayerFusion | None = None


FusionVerdicts: TypeAlias = Mapping[str, Verdict]
"""Name of a module → what was found of it."""

_Fusion = TypeVar("_Fusion", NormFusion, AttentionFusion, RouterFusion, LayerFusion)

# Most layers are alike: a verdict is sent once, with the names of its modules.
_Grouped: TypeAlias = list[tuple[Verdict, list[str]]]
_decode: Final = msgspec.msgpack.Decoder(_Grouped).decode


class VerdictLedger:
    """known: verdicts that were given. found: those that hold for the modules of a model."""

    def __init__(self, known: FusionVerdicts) -> None:
        self.known = known
        self.found: dict[str, Verdict] = {}

    def settle(
        self,
        name: str,
        module: nn.Module,
        kind: type[_Fusion],
        attempt: Callable[[], _Fusion | None],
    ) -> _Fusion | None:
        """What takes a module's place: by its verdict, or by a trial if none fits the module.

        kind: of what may take its place, as its form says. attempt: the trial.
        """
        verdict = self.known.get(name)
        if verdict is not None and verdict.of == _class_of(module):
            fusion = verdict.fusion
            if fusion is None or isinstance(fusion, kind):
                self.found[name] = verdict
                return fusion
        found = attempt()
        self.found[name] = Verdict(_class_of(module), found)
        return found


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def encode_verdicts(verdicts: FusionVerdicts) -> bytes:
    """For other processes. b"": there are none, or they exceed `MOST_BYTES`."""
    groups: dict[Verdict, list[str]] = {}
    for name, verdict in verdicts.items():
        groups.setdefault(verdict, []).append(name)
    encoded = msgspec.msgpack.encode(list(groups.items())) if groups else b""
    return encoded if len(encoded) <= MOST_BYTES else b""


def decode_verdicts(encoded: bytes) -> dict[str, Verdict]:
    """Those of another process; none if they cannot be understood or exceed `MOST_BYTES`."""
    if not encoded or len(encoded) > MOST_BYTES:
        return {}
    try:
        groups = _decode(encoded)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return {name: verdict for verdict, names in groups for name in names}
