"""Logits to tokens where the logits are. The rules are those of `sampler`; nothing waits.

The tokens of a step stay on the device, for the step after it, and are copied to the host, which
reads them when that step is launched already. What is unlike the CPU's sampler: sums of weights are
rounded otherwise, so that a number close to the border of two tokens may pick the other one; and of
tokens that are equally likely at the border of top-k or top-p any may be kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexpert.engine.request import TokenLogprobs
from flexpert.engine.sampler import COLDEST, Masks, StepSampling, StepTokens, numbers
from flexpert.engine.sequence import Sampled, SampleState
from flexpert.kernels.device_stream import DeviceStream, StreamEvent
from flexpert.kernels.step_upload import StepUpload

_BLOCK = 1024  # weights added up at a time
_MOST_TOP = 1024  # of top-k; the kept tokens are found without sorting all
_SORTED_AT_ONCE = 2**25  # weights
_IMPOSSIBLE = "no token is possible: what may come next is forbidden otherwise"


class DeviceSampler:
    """As `Sampler`, on a device.

    Args:
        sampled: [most] int64 on the device; the tokens of each step, in the order of its samples.
        stream: of the device.
    """

    def __init__(self, sampled: Tensor, stream: DeviceStream) -> None:
        self._sampled = sampled
        self._stream = stream
        self._upload = StepUpload(stream)
        # two steps are in flight at most
        self._pieces = [_HostTokens.make(stream, len(sampled)) for _ in range(2)]

    def start(
        self,
        logits: Tensor,
        samples: Sequence[SampleState],
        masks: Masks | None = None,
        unseen: int = 0,
    ) -> StepSampling:
        """Launch the sampling of one token for each row; as `Sampler.start`."""
        piece = self._pieces[0]
        self._pieces.reverse()
        count = len(samples)
        positions = [s.position + (row < unseen) for row, s in enumerate(samples)]
        wanted = _Wanted.of(samples, positions, logits.shape[1], masks)
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
            x = x.float()
            x = _adjusted(x.clone() if x is logits else x, there)
            possible = x.amax(dim=-1)
            if wanted.greedy:
                torch.argmax(x, dim=-1, out=tokens)
            if wanted.drawn:
                wanted.draw(x, possible, there["rows"], there["settings"], tokens)
        asked = [row for row, s in enumerate(samples) if s.params.logprobs is not None]
        told = [
            _told(logits[row : row + 1], tokens[row : row + 1], samples[row].params.logprobs)
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


@dataclass(slots=True)
class _Wanted:
    """What the host knows of a step's samples.

    arrays: for the device, by name. plain: the likeliest tokens are all that is wanted. greedy,
    drawn: some rows take the likeliest, some are drawn. few: of how many of these few tokens are
    kept, of which there are `most`; cut: of how many what top-p leaves; of the rest it is all.
    """

    arrays: dict[str, Tensor]
    plain: bool
    greedy: bool = False
    drawn: bool = False
    few: int = 0
    most: int = 0
    cut: int = 0

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
        drawn = [row for row, s in enumerate(samples) if not s.greedy]
        wanted.greedy = len(drawn) < len(samples)
        if drawn:
            wanted._sort(samples, positions, drawn, vocab)
        return wanted

    def _sort(
        self,
        samples: Sequence[SampleState],
        positions: Sequence[int],
        drawn: list[int],
        vocab: int,
    ) -> None:
        """The rows that are drawn, by what is kept of them."""
        kinds: tuple[list[int], list[int], list[int]] = ([], [], [])
        for row in drawn:
            params = samples[row].params
            top_k = min(params.top_k or vocab, vocab)
            few = top_k <= _MOST_TOP and top_k < vocab
            kinds[0 if few else 1 if top_k < vocab or params.top_p < 1 else 2].append(row)
            self.most = max(self.most, top_k) if few else self.most
        self.drawn, self.few, self.cut = True, len(kinds[0]), len(kinds[1])
        rows = [row for kind in kinds for row in kind]
        states = [samples[row] for row in rows]
        settings = np.array(
            [
                [1 / max(s.params.temperature, COLDEST) for s in states],
                [s.params.min_p for s in states],
                [s.params.top_p for s in states],
                [min(s.params.top_k or vocab, vocab) for s in states],
                numbers(states, [positions[row] for row in rows]),
            ]
        )
        self.arrays["rows"] = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.arrays["settings"] = torch.from_numpy(settings)

    def draw(
        self, x: Tensor, largest: Tensor, rows: Tensor, settings: Tensor, tokens: Tensor
    ) -> None:
        """tokens [M] int64 ← of the rows of x [M, vocab] float32 that are drawn.

        largest: [M], of each row of x. rows: [n] int64, settings: [5, n] float64: 1 / temperature,
        min-p, top-p, top-k and the uniform number of each.
        """
        bounds = [0, self.few, self.few + self.cut, len(rows)]
        for kind, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin == end:
                continue
            picked, own = rows[begin:end], settings[:, begin:end]
            weights = x.index_select(0, picked)
            weights -= largest.index_select(0, picked)[:, None]
            weights *= own[0, :, None].float()
            weights.exp_()
            weights *= weights >= own[1, :, None].float()
            if kind == 0:
                chosen = _of_falling(*weights.topk(self.most, dim=1), own)
            elif kind == 1:
                chosen = _of_sorted(weights, own)
            else:
                chosen = _pick(weights, own[4])
            tokens.index_copy_(0, picked, chosen)


def _of_sorted(weights: Tensor, own: Tensor) -> Tensor:
    """[n] tokens of weights [n, vocab], of which top-p or top-k may keep many.

    own: [5, n] float64, see `_Wanted.draw`.
    """
    at_once = max(1, _SORTED_AT_ONCE // weights.shape[1])
    chosen = [
        _of_falling(*weights[i : i + at_once].sort(dim=1, descending=True), own[:, i : i + at_once])
        for i in range(0, len(weights), at_once)
    ]
    return torch.cat(chosen)


def _of_falling(values: Tensor, ids: Tensor, own: Tensor) -> Tensor:
    """The same of the largest weights [n, most] and their tokens, falling."""
    place = torch.arange(values.shape[1], device=values.device)
    kept = values * (place < own[3, :, None])
    sums = kept.double().cumsum(dim=1)
    # the fewest whose sum reaches top-p: those before which it is not reached
    kept = torch.where(sums - kept < own[2, :, None] * sums[:, -1:], kept, 0.0)
    by_id = torch.argsort(ids, dim=1)
    at = _first_beyond(kept.gather(1, by_id), own[4])
    return ids.gather(1, by_id.gather(1, at[:, None]))[:, 0]


def _pick(weights: Tensor, u: Tensor) -> Tensor:
    """[n]: the index in each row of weights [n, width] at u [n] of its cumulative weight."""
    width = weights.shape[1]
    blocks = torch.nn.functional.pad(weights, (0, -width % _BLOCK)).view(len(u), -1, _BLOCK)
    sums = blocks.sum(dim=2, dtype=torch.float64)
    block = _first_beyond(sums, u)
    before = (sums.cumsum(dim=1) - sums).gather(1, block[:, None])
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    rest = u[:, None] * sums.sum(dim=1, keepdim=True) - before
    return block * _BLOCK + _first_over(inside, rest)


def _first_beyond(weights: Tensor, u: Tensor) -> Tensor:
    """[n]: the first index in each row of weights [n, width] where their sum exceeds u [n] of it
    all."""
    return _first_over(weights, u[:, None] * weights.sum(dim=1, keepdim=True, dtype=torch.float64))


def _first_over(weights: Tensor, target: Tensor) -> Tensor:
    """The same for a sum that exceeds target [n, 1]; it is always a positive weight."""
    over = weights.cumsum(dim=1, dtype=torch.float64) > target
    over &= weights > 0
    places = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, places, 0).amax(dim=1)
    first = torch.where(over, places, weights.shape[1]).amin(dim=1)
    return torch.minimum(first, last)


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


def _told(logits: Tensor, token: Tensor, top: int | None) -> Tensor:
    """[2 + 2 * top] float64: the log probability of a token, how many are more likely and itself,
    the `top` likeliest and their log probabilities.

    logits: [1, vocab], unadjusted; token: [1].
    """
    row = logits.double()
    shift = row.logsumexp(dim=1)
    logit = row.gather(1, token[:, None])
    rank = (row > logit).sum(dim=1) + 1
    best = row.topk(min(top or 0, row.shape[1]), dim=1)
    told = (logit[:, 0] - shift, rank, best.indices, best.values - shift[:, None])
    return torch.cat([part.double().flatten() for part in told])


def _read(told: list[float]) -> TokenLogprobs:
    """What `_told` has made."""
    top = (len(told) - 2) // 2
    return TokenLogprobs(
        told[0], [int(token) for token in told[2 : 2 + top]], told[2 + top :], int(told[1])
    )


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
        self.sizes = [len(one) for one in told]
        if told:
            if len(self.told) < sum(self.sizes):
                self.told = self.stream.host_buffer(16 * sum(self.sizes)).view(torch.float64)
            values = torch.cat(told)
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
            logprobs[row] = _read(piece.told[begin : begin + size].tolist())
            begin += size
        failed: dict[int, Exception] = {}
        if self._judged:
            none = torch.isneginf(piece.possible[:count]).nonzero().flatten().tolist()
            failed = {row: ValueError(_IMPOSSIBLE) for row in none}
        return StepTokens(Sampled(piece.tokens[:count].tolist(), logprobs), failed)
