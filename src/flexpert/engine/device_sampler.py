"""Logits to tokens where the logits are. The rules are those of `sampler`; nothing waits.

The tokens of a step stay on the device, for the step after it, and are copied to the host, which
reads them when that step is launched already. What is unlike the CPU's sampler: sums of weights are
rounded otherwise, so that a number close to the border of two tokens may pick the other one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexpert.engine.request import TokenLogprobs
from flexpert.engine.sampler import (
    COLDEST,
    Masks,
    StepSampling,
    StepTokens,
    numbers,
    read_told,
    told_of,
)
from flexpert.engine.sequence import Sampled, SampleState, Unseen
from flexpert.kernels.cuda.sampling import SETTINGS, choose_tokens
from flexpert.kernels.device_stream import DeviceStream, StreamEvent
from flexpert.kernels.step_upload import StepUpload

_IMPOSSIBLE = "no token is possible: what may come next is forbidden otherwise"


class DeviceSampler:
    """As `Sampler`, on a device.

    Args:
        sampled: [most] int64 on the device; the tokens of each step, in the order of its samples.
        accepted: [most] int64 on the device: how many proposed tokens came true for each sequence
            of the step before; None: nothing is proposed there.
        stream: of the device.
        deterministic: a row's token depends on no other row.
    """

    def __init__(
        self,
        sampled: Tensor,
        stream: DeviceStream,
        *,
        accepted: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        self._deterministic = deterministic
        self._sampled = sampled
        self._accepted = accepted
        self._stream = stream
        self._upload = StepUpload(stream)
        # two steps are in flight at most
        self._pieces = [_HostTokens.make(stream, len(sampled)) for _ in range(2)]

    def start(
        self,
        logits: Tensor,
        samples: Sequence[SampleState],
        masks: Masks | None = None,
        unseen: Unseen | None = None,
    ) -> StepSampling:
        """Launch the sampling of one token for each row; as `Sampler.start`."""
        piece = self._pieces[0]
        self._pieces.reverse()
        count = len(samples)
        later = [0] * count if unseen is None else unseen.tokens.tolist()
        positions = [s.position + late for s, late in zip(samples, later, strict=True)]
        wanted = _Wanted.of(samples, positions, logits.shape[1], masks)
        if unseen is not None and not wanted.plain and unseen.more.any():
            wanted.add_numbers(samples, positions, unseen)
        there = dict(
            zip(wanted.arrays, self._upload.send(list(wanted.arrays.values())), strict=True)
        )
        tokens = self._sampled[:count]
        x = logits
        if "masks" in there:
            x = _masked(x, there["masks"])
        if wanted.plain:
            torch.argmax(x, dim=-1, out=tokens)
            possible = x.amax(dim=-1) if "masks" in there else None
        else:
            if wanted.adjusted or self._deterministic:  # of one type, whatever others ask for
                x = x.float()
            if wanted.adjusted:
                x = _adjusted(x.clone() if x is logits else x, there)
            if "numbers" in there:  # of the position at which each turns out to be
                assert self._accepted is not None
                more = self._accepted[there["sequences"].clamp_min(0)]
                more = torch.minimum(more, there["more"])
                torch.gather(there["numbers"], 0, more.unsqueeze(0), out=there["settings"][-1:])
            possible = choose_tokens(x, there["settings"], tokens)
        asked = [row for row, s in enumerate(samples) if s.params.logprobs is not None]
        told = [
            told_of(logits[row : row + 1], tokens[row : row + 1], samples[row].params.logprobs or 0)
            for row in asked
        ]
        piece.take(tokens, possible, told)
        return _DeviceSampling(piece, count, possible is not None, asked)


def _adjusted(x: Tensor, there: Mapping[str, Tensor]) -> Tensor:
    """x [M, vocab] float32, changed in place: biases, penalties, impossible tokens."""
    if "bias_at" in there:
        row, token = there["bias_at"]
        x.index_put_((row, token), there["bias"], accumulate=True)
    if "punished_at" in there:
        row, token = there["punished_at"]
        factor, less = there["punished"]
        value = x[row, token]
        x[row, token] = torch.where(value > 0, value / factor, value * factor) - less
    if "impossible_at" in there:  # is so whatever was added
        row, token = there["impossible_at"]
        x[row, token] = -torch.inf
    return x


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the host knows of a step's samples.

    arrays: for the device, by name. plain: the likeliest tokens are all that is wanted.
    """

    arrays: dict[str, Tensor]
    plain: bool

    @property
    def adjusted(self) -> bool:
        """Logits of single tokens change."""
        return any(name.endswith("_at") for name in self.arrays)

    @classmethod
    def of(
        cls,
        samples: Sequence[SampleState],
        positions: Sequence[int],
        vocab: int,
        masks: Masks | None,
    ) -> _Wanted:
        arrays: dict[str, Tensor] = {}
        bias, out, punished = _Entries(), _Entries(), _Entries()
        for row, (s, position) in enumerate(zip(samples, positions, strict=True)):
            if s.plain and not s.stop_ids:
                continue
            if s.allowed is not None:
                masks = _allow(masks, row, len(samples), vocab, s.allowed)
            if s.params.bad_token_ids:
                out.add(row, np.array([t for t in s.impossible() if t < vocab], dtype=np.int64))
            if s.bias is not None:
                inside = s.bias[0] < vocab
                bias.add(row, s.bias[0][inside], s.bias[1][None, inside])
            if s.counts is not None:
                punished.add(row, s.counts.ids, _penalties(s))
            if position < s.params.min_tokens:
                out.add(row, s.stop_array[(s.stop_array >= 0) & (s.stop_array < vocab)])
        if masks is not None:
            arrays["masks"] = torch.from_numpy(masks)
        bias.put(arrays, "bias")
        punished.put(arrays, "punished")
        out.put(arrays, "impossible")
        if "bias" in arrays:
            arrays["bias"] = arrays["bias"][0]
        plain = all(s.plain for s in samples) and "impossible_at" not in arrays
        wanted = cls(arrays, plain)
        if not plain:
            arrays["settings"] = torch.from_numpy(_settings(samples, positions, vocab))
        return wanted

    def add_numbers(
        self, samples: Sequence[SampleState], positions: Sequence[int], unseen: Unseen
    ) -> None:
        """Of samples whose positions may be larger, by as much as the device knows: the uniform
        number of each of them, [1 + most, M]."""
        drawn, most = _drawn(samples), int(unseen.more.max())
        table = np.zeros((1 + most, len(samples)))
        states = [samples[row] for row in drawn for _ in range(1 + most)]
        places = [positions[row] + more for row in drawn for more in range(1 + most)]
        if drawn:
            table[:, drawn] = numbers(states, places).reshape(len(drawn), 1 + most).T
        self.arrays["numbers"] = torch.from_numpy(table)
        self.arrays["more"] = torch.from_numpy(unseen.more)
        self.arrays["sequences"] = torch.from_numpy(unseen.sequences)


def _drawn(samples: Sequence[SampleState]) -> list[int]:
    return [row for row, s in enumerate(samples) if not s.greedy]


def _settings(
    samples: Sequence[SampleState], positions: Sequence[int], vocab: int
) -> NDArray[np.float64]:
    """[SETTINGS, M], see `choose_tokens`."""
    settings = np.zeros((SETTINGS, len(samples)))
    drawn = _drawn(samples)
    if drawn:
        states = [samples[row] for row in drawn]
        every = [s.params for s in states]
        settings[:, drawn] = (
            [1 / max(params.temperature, COLDEST) for params in every],
            [params.min_p for params in every],
            [params.top_p for params in every],
            [min(params.top_k or vocab, vocab) for params in every],
            numbers(states, [positions[row] for row in drawn]),
        )
    return settings


def _masked(logits: Tensor, words: Tensor) -> Tensor:
    """logits [M, vocab] of which those whose bit in words [M, vocab / 32] is 0 are -inf."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    possible = ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(possible == 0, -torch.inf)


def _allow(
    masks: Masks | None, row: int, rows: int, vocab: int, allowed: NDArray[np.int64]
) -> Masks:
    """masks [rows, vocab / 32] with nothing but `allowed` in one row; a copy."""
    width = -(-vocab // 32)
    masks = np.full((rows, width), -1, dtype=np.int32) if masks is None else masks.copy()
    bits = np.zeros(32 * width, dtype=np.bool_)
    bits[allowed[allowed < vocab]] = True
    masks[row] &= np.packbits(bits, bitorder="little").view(np.int32)
    return masks


def _penalties(s: SampleState) -> NDArray[np.float32]:
    """[2, distinct]: the factor of each token of prompt and answer, and what is taken off."""
    assert s.counts is not None
    counts, params = s.counts.answer, s.params
    less = np.float32(params.frequency_penalty) * counts
    less = less + np.float32(params.presence_penalty) * (counts > 0)
    return np.stack([np.full_like(counts, params.repetition_penalty), less.astype(np.float32)])


class _Entries:
    """Places in [M, vocab], and some values for each."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(
        self, row: int, ids: NDArray[np.int64], values: NDArray[np.float32] | None = None
    ) -> None:
        """values: [any, ids]"""
        if len(ids):
            self._places.append(np.stack([np.full(len(ids), row), ids]))
            if values is not None:
                self._values.append(values)

    def put(self, arrays: dict[str, Tensor], name: str) -> None:
        if self._places:
            arrays[f"{name}_at"] = torch.from_numpy(np.concatenate(self._places, axis=1))
        if self._values:
            arrays[name] = torch.from_numpy(np.concatenate(self._values, axis=1))


@dataclass(slots=True)
class _HostTokens:
    """Where one step's tokens come to the host.

    tokens: [most] int64. possible: [most] float32, -inf where no token is. told: of all rows whose
    log probabilities are asked for, sizes[i] numbers each. copied: they are there.
    """

    stream: DeviceStream
    tokens: Tensor
    possible: Tensor
    told: Tensor
    sizes: list[int]
    copied: StreamEvent

    @classmethod
    def make(cls, stream: DeviceStream, most: int) -> _HostTokens:
        return cls(
            stream,
            stream.host_buffer(8 * most).view(torch.int64),
            stream.host_buffer(4 * most).view(torch.float32),
            stream.host_buffer(8).view(torch.float64),
            [],
            stream.event(),
        )

    def take(self, tokens: Tensor, possible: Tensor | None, told: list[Tensor]) -> None:
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        if possible is not None:
            self.possible[: len(possible)].copy_(possible, non_blocking=True)
        self.sizes = [one.numel() for one in told]
        if told:
            if len(self.told) < sum(self.sizes):
                self.told = self.stream.host_buffer(16 * sum(self.sizes)).view(torch.float64)
            values = torch.cat([one.flatten() for one in told])
            self.told[: len(values)].copy_(values, non_blocking=True)
        self.copied.record()


class _DeviceSampling:
    """See `StepSampling`. asked: rows whose log probabilities are told."""

    def __init__(self, piece: _HostTokens, count: int, judged: bool, asked: list[int]) -> None:
        self._piece = piece
        self._count = count
        self._judged = judged
        self._asked = asked

    def finish(self) -> StepTokens:
        piece, count = self._piece, self._count
        piece.copied.synchronize()
        logprobs: list[TokenLogprobs | None] = [None] * count
        begin = 0
        for row, size in zip(self._asked, piece.sizes, strict=True):
            logprobs[row] = read_told(piece.told[begin : begin + size].tolist())
            begin += size
        failed: dict[int, Exception] = {}
        if self._judged:
            none = torch.isneginf(piece.possible[:count]).nonzero().flatten().tolist()
            failed = {row: ValueError(_IMPOSSIBLE) for row in none}
        return StepTokens(Sampled(piece.tokens[:count].tolist(), logprobs), failed)
