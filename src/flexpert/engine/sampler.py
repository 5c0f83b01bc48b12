"""Logits to tokens. A row's result depends on its logits and its `SampleState`, on nothing else.

Order of operations, as in vLLM: logprobs of the raw logits; tokens that are not allowed, or would
complete what the answer must not have; the bias; repetition, frequency and presence penalties; end
tokens masked before `min_tokens`, and what a structure forbids; temperature; min-p; top-k; top-p of
what is left.

Randomness is counter-based: one uniform number per (seed, position in the answer), from
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So a
sequence that moves to another rank goes on with the numbers it would have had. The number
picks from the cumulative distribution over the kept tokens in order of token id. That order was
chosen over descending probability because it needs no sort, and because two tokens that rounding
brings into another order do not then exchange their places. Which tokens are kept is decided by
descending probability, equal ones by ascending id.

The same bits for a row whatever shares its batch: every sum is taken in blocks of 64 along the
row, and within a block and over the blocks in a fixed order. NumPy, because torch's CPU kernels
handle the odd elements at the end of a whole batch by other code than the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flexpert.engine.request import TokenLogprobs
from flexpert.engine.sequence import SEQUENCE_FAULTS, Sampled, SampleState, Unseen

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Masks = NDArray[np.int32]

_BLOCK = 64  # weights added up at a time
_CACHED = 2**18  # float32 weights that are worked on at once: 1 MiB, to stay in the L2 cache
_SCORED_AT_ONCE = 32  # rows in float64
_AHEAD = 32  # positions whose uniform numbers are drawn in one go
COLDEST = 1e-30  # below it float32 quotients lose their meaning; it is greedy long before
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: NDArray[np.uint64], key: NDArray[np.uint64], rounds: int = 10
) -> NDArray[np.uint64]:
    """Random words of a counter and a key.

    counter: [4, n], key: [2, n], result: [4, n]; all uint64 holding 32-bit words.
    """
    even, odd = counter[0::2], counter[1::2]
    keys = (key + np.arange(rounds, dtype=np.uint64)[:, None, None] * _WEYL) & _WORD
    for round_key in keys:
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[::-1] ^ odd ^ round_key
        odd = (product & _WORD)[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Doubles:
    """[n] float64 in [0, 1) with 53 random bits: one for each (seed, position).

    The Philox key is the 64-bit seed, the counter the position; low words first.
    """
    key = np.array(seeds, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(position)
    words = philox4x32(
        np.stack([position & _WORD, position >> _SHIFT, zero, zero]),
        np.stack([key & _WORD, key >> _SHIFT]),
    )
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    out: Doubles = (high.astype(np.float64) * 2.0**26 + low.astype(np.float64)) * 2.0**-53
    return out


@dataclass(frozen=True, slots=True)
class StepTokens:
    """failed: row → why its sequence cannot be sampled; its token counts for nothing."""

    sampled: Sampled
    failed: dict[int, Exception] = field(default_factory=dict)


class StepSampling(Protocol):
    """The sampling of one step that was started."""

    def finish(self) -> StepTokens:
        """Wait for the tokens."""
        ...


class TokenSampler(Protocol):
    """Samples the next token of each sequence. All state is in the `SampleState`s."""

    def start(
        self,
        logits: torch.Tensor,
        samples: Sequence[SampleState],
        masks: Masks | None = None,
        unseen: Unseen | None = None,
    ) -> StepSampling:
        """One token for each row.

        Args:
            logits: [M, vocab], where the model computes them; not changed, and read until the
                sampling is finished.
            samples: the M sequences.
            masks: [M, vocab / 32 rounded up] int32, a bit for each token that is possible, the
                lowest bit first; None: all are, in every row.
            unseen: what the host does not know yet of tokens before them, see
                `SampleState.goes_on_unseen`; None: nothing.
        """
        ...


class Sampler:
    """The `TokenSampler` of a CPU."""

    def start(
        self,
        logits: torch.Tensor,
        samples: Sequence[SampleState],
        masks: Masks | None = None,
        unseen: Unseen | None = None,
    ) -> StepSampling:
        """As in `TokenSampler`; a CPU does not look ahead."""
        assert unseen is None
        return _HostSampling(self, logits, samples, masks)

    def sample(
        self,
        logits: torch.Tensor,
        samples: Sequence[SampleState],
        masks: Masks | None = None,
    ) -> Sampled:
        """One token for each row.

        Args:
            logits: [M, vocab] float32, on any device; not changed.
            samples: the M sequences.
            masks: [M, vocab / 32 rounded up] int32, a bit for each token that is possible, the
                lowest bit first; None: all are, in every row.
        """
        if logits.ndim != 2 or len(logits) != len(samples):
            raise ValueError(f"logits {list(logits.shape)} for {len(samples)} sequences")
        if not samples:
            return Sampled([], [])
        plain = all(s.plain and not (s.stop_ids and s.must_go_on) for s in samples)
        if logits.dtype is not torch.float32 or logits.device.type != "cpu":
            logits = logits.to("cpu", torch.float32)
        raw: Floats = logits.numpy(force=True)
        if plain:
            best = _masked(raw, masks).argmax(axis=1)
            return Sampled(best.tolist(), [None] * len(samples))
        tokens = _choose(_masked(_adjusted(raw, samples), masks), samples)
        logprobs = [
            None if s.params.logprobs is None else _logprobs(row, token, s.params.logprobs)
            for row, token, s in zip(raw, tokens, samples, strict=True)
        ]
        return Sampled(tokens, logprobs)


@dataclass(frozen=True, slots=True)
class _HostSampling:
    sampler: Sampler
    logits: torch.Tensor
    samples: Sequence[SampleState]
    masks: Masks | None

    def finish(self) -> StepTokens:
        """A sequence that cannot be sampled fails, and the others go on."""
        try:
            return StepTokens(self.sampler.sample(self.logits, self.samples, self.masks))
        except SEQUENCE_FAULTS:
            pass
        each: list[Sampled] = []
        failed: dict[int, Exception] = {}
        for row in range(len(self.samples)):
            one = slice(row, row + 1)
            mask = None if self.masks is None else self.masks[one]
            try:
                each.append(self.sampler.sample(self.logits[one], self.samples[one], mask))
            except SEQUENCE_FAULTS as error:
                each.append(Sampled([0], [None]))
                failed[row] = error
        tokens = [one.tokens[0] for one in each]
        return StepTokens(Sampled(tokens, [one.logprobs[0] for one in each]), failed)


def score(
    logits: torch.Tensor, tokens: Sequence[int], top: int, *, deterministic: bool = False
) -> list[TokenLogprobs]:
    """Log probabilities of given tokens, one a row.

    Args:
        logits: [n, vocab] float32, on any device. tokens: n. top: how many of the likeliest, too.
        deterministic: a row has the same bits whatever n is.
    """
    if logits.is_cuda:
        return score_on_device(logits, tokens, top, 1 if deterministic else _SCORED_AT_ONCE)
    raw: Floats = logits.detach().to(torch.float32).numpy()
    return [_logprobs(row, token, top) for row, token in zip(raw, tokens, strict=True)]


def score_on_device(
    logits: torch.Tensor, tokens: Sequence[int], top: int, at_once: int = _SCORED_AT_ONCE
) -> list[TokenLogprobs]:
    """As `score`, where the logits are: a vocabulary of 150,000 in 256 rows is 150 MB.

    at_once: rows, of which torch chooses the order of their sums.
    """
    wanted = torch.tensor(tokens, device=logits.device)
    told = [
        told_of(logits[start : start + at_once], wanted[start : start + at_once], top)
        for start in range(0, len(tokens), at_once)
    ]
    return list(map(read_told, torch.cat(told).tolist())) if told else []


def told_of(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """[n, 2 + 2 * top] float64, where the logits are, for `read_told`: the log probability of each
    token, how many are more likely and itself, the `top` likeliest and their log probabilities.

    Args:
        logits: [n, vocab], unadjusted. tokens: [n] int64. top: at most the vocabulary is told of.
    """
    rows = logits.double()
    shift = rows.logsumexp(dim=1, keepdim=True)
    logit = rows.gather(1, tokens[:, None])
    rank = (rows > logit).sum(dim=1, keepdim=True) + 1
    best = rows.topk(min(top, rows.shape[1]), dim=1)
    parts = (logit - shift, rank, best.indices, best.values - shift)
    return torch.cat([part.double() for part in parts], dim=1)


def read_told(told: list[float]) -> TokenLogprobs:
    """One row of what `told_of` has made."""
    top = (len(told) - 2) // 2
    return TokenLogprobs(
        told[0], [int(token) for token in told[2 : 2 + top]], told[2 + top :], int(told[1])
    )


def _masked(x: Floats, masks: Masks | None) -> Floats:
    """[M, vocab]: logits of which those that are impossible are -inf; `x` itself without
    masks.

    Raises: ValueError: a row has none that is possible.
    """
    if masks is None:
        return x
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=x.shape[1], bitorder="little")
    out: Floats = np.where(bits.view(np.bool_), x, np.float32(-np.inf))
    if np.isneginf(out.max(axis=1)).any():
        raise ValueError("no token is possible: what may come next is forbidden otherwise")
    return out


def _adjusted(raw: Floats, samples: Sequence[SampleState]) -> Floats:
    """[M, vocab]: logits with biases, penalties and masks; `raw` itself if none."""
    x = raw
    for index, state in enumerate(samples):
        masked = state.must_go_on and len(state.stop_array) > 0
        steered = state.allowed is not None or state.bias or state.params.bad_token_ids
        if state.counts is None and not masked and not steered:
            continue
        if x is raw:
            x = raw.copy()
        row = x[index]
        if steered:
            _steer(row, state)
        if state.counts is not None:
            params, ids, counts = state.params, state.counts.ids, state.counts.answer
            value = row[ids]
            factor = np.float32(params.repetition_penalty)
            value = np.where(value > 0, value / factor, value * factor)
            value -= np.float32(params.frequency_penalty) * counts
            value -= np.float32(params.presence_penalty) * (counts > 0)
            row[ids] = value
        if masked:
            ends = state.stop_array
            row[ends[(ends >= 0) & (ends < len(row))]] = -np.inf
    return x


def _steer(row: Floats, state: SampleState) -> None:
    """Of a row [vocab]: what is not allowed becomes impossible, what is biased more or less likely;
    tokens that the row does not have are passed over."""
    size = len(row)
    if state.allowed is not None:
        kept = state.allowed[state.allowed < size]
        values = row[kept]
        row[:] = -np.inf
        row[kept] = values
    for token in state.impossible():
        if token < size:
            row[token] = -np.inf
    if state.bias is not None:
        ids, values = state.bias
        there = ids < size
        row[ids[there]] += values[there]


def _choose(x: Floats, samples: Sequence[SampleState]) -> list[int]:
    """The token of each row of x [M, vocab], adjusted logits."""
    drawn = [i for i, s in enumerate(samples) if not s.greedy]
    if not drawn:
        return [int(token) for token in x.argmax(axis=1)]
    tokens = x.argmax(axis=1) if len(drawn) < len(samples) else np.zeros(len(x), dtype=np.int64)
    u = numbers([samples[i] for i in drawn], [samples[i].position for i in drawn])
    at_once = max(1, _CACHED // x.shape[1])
    for start in range(0, len(drawn), at_once):
        rows = drawn[start : start + at_once]
        states = [samples[i] for i in rows]
        weights = _weights(x, rows, states)
        _filter(weights, x.shape[1], states)
        tokens[rows] = _pick(weights, u[start : start + at_once])
    return [int(token) for token in tokens]


def numbers(states: Sequence[SampleState], positions: Sequence[int]) -> Doubles:
    """[n] float64: the uniform number of each sequence at a position of its answer.

    One call of `uniforms` costs about the same for one number as for a thousand, so those of the
    next positions are drawn along; they are a function of seed and position and never outdated.
    Positions of one sequence differ by less than so many.
    """
    wanted: dict[int, tuple[SampleState, int, int]] = {}  # with its first and its last position
    for s, position in zip(states, positions, strict=True):
        _, first, last = wanted.get(id(s), (s, position, position))
        wanted[id(s)] = s, min(first, position), max(last, position)
    dry = [
        (s, first)
        for s, first, last in wanted.values()
        if not (s.numbers_from <= first and last < s.numbers_from + len(s.numbers))
    ]
    if dry:
        seeds = [s.seed for s, _ in dry for _ in range(_AHEAD)]
        places = [position + step for _, position in dry for step in range(_AHEAD)]
        fresh = uniforms(seeds, places).reshape(len(dry), _AHEAD)
        for (state, position), drawn in zip(dry, fresh.tolist(), strict=True):
            state.numbers, state.numbers_from = drawn, position
    return np.array([s.numbers[p - s.numbers_from] for s, p in zip(states, positions, strict=True)])


def _weights(x: Floats, rows: list[int], states: Sequence[SampleState]) -> Floats:
    """exp((x - max) / temperature) of the given rows, [rows, vocab rounded up to whole blocks]."""
    vocab = x.shape[1]
    out: Floats = np.empty((len(rows), -(-vocab // _BLOCK) * _BLOCK), dtype=np.float32)
    out[:, vocab:] = -np.inf
    temperatures = np.array([[s.params.temperature] for s in states])
    scale = (1 / np.maximum(temperatures, COLDEST)).astype(np.float32)
    picked = x if len(rows) == len(x) else x[rows]
    body = out[:, :vocab]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # -inf - -inf: all masked
        np.subtract(picked, picked.max(axis=1, keepdims=True), out=body)
        body *= scale
        return np.exp(out, out=out)


def _filter(weights: Floats, vocab: int, states: Sequence[SampleState]) -> None:
    """Sets the weights [rows, width] of tokens outside min-p, top-k and top-p to zero."""
    min_p = np.array([s.params.min_p for s in states], dtype=np.float32)
    if min_p.any():
        weights *= weights >= min_p[:, None]  # the most likely token weighs 1
    top_k = np.array([min(s.params.top_k or vocab, vocab) for s in states], dtype=np.int64)
    top_p = np.array([s.params.top_p for s in states])
    rows = np.flatnonzero((top_k < vocab) | (top_p < 1))
    if len(rows) == len(states):
        _keep_largest(weights, vocab, min_p, top_k, top_p)
    elif len(rows) > 0:
        kept = weights[rows]
        _keep_largest(kept, vocab, min_p[rows], top_k[rows], top_p[rows])
        weights[rows] = kept


def _keep_largest(weights: Floats, vocab: int, least: Floats, top_k: Ints, top_p: Doubles) -> None:
    """Zeroes all but the top_k [rows] largest weights [rows, width], and of these all but the
    fewest whose sum reaches top_p [rows] of theirs. least: [rows], other weights are 0 already."""
    total = _cumulative(_blocks(weights))[:, -1]
    limited = top_k < vocab
    # All tokens below this weight together have less than the share that top-p leaves out. For a
    # share near the rounding of the sums that proves nothing, and all are needed.
    light = np.where(limited | (top_p > 1 - 1e-5), 0, 0.5 * (1 - top_p) * total / vocab)
    most = _largest(weights, np.maximum(least, light.astype(np.float32)), top_k)
    # From the largest down; the blocks are counted from there too, so what a sum adds up, and in
    # which order, does not depend on how many weights were sorted.
    for index in np.flatnonzero(limited).tolist():
        most[index, : max(0, most.shape[1] - top_k[index])] = 0
    falling = _blocks(most)[:, ::-1, ::-1]
    sums = _cumulative(falling)
    total = np.where(limited, sums[:, -1], total)
    reached = _first_reaching(falling, sums, top_p * total) + 1
    count = np.minimum(np.where(top_p < 1, reached, top_k), top_k)
    threshold = most[np.arange(len(most)), np.maximum(most.shape[1] - count, 0)]
    keep = weights >= threshold[:, None]
    weights *= keep
    for index, limit in enumerate(count.tolist()):
        excess = np.count_nonzero(keep[index]) - limit
        if excess > 0 and threshold[index] > 0:
            ties = np.flatnonzero(weights[index] == threshold[index])
            weights[index, ties[len(ties) - excess :]] = 0


def _largest(weights: Floats, least: Floats, top_k: Ints) -> Floats:
    """The top_k largest weights of each row that are `least` or more, ascending, in whole blocks.

    Below them other weights of the row, or zeros.
    """
    rows, width = weights.shape
    heavy = weights >= least[:, None]
    counts = [np.count_nonzero(row) for row in heavy]
    needed = int(np.minimum(counts, top_k).max())
    if needed > width // 8:  # measured: picking them out costs more than sorting all
        return np.sort(weights, axis=1)
    most = np.zeros((rows, -(-max(needed, 1) // _BLOCK) * _BLOCK), dtype=np.float32)
    for index, (count, limit) in enumerate(zip(counts, top_k.tolist(), strict=True)):
        row = weights[index] if count > width // 8 else weights[index, heavy[index]]
        if len(row) > limit:
            row = np.partition(row, len(row) - limit)[len(row) - limit :]
        most[index, most.shape[1] - len(row) :] = row
    most.sort(axis=1)
    return most


def _pick(weights: Floats, u: Doubles) -> Ints:
    """The index in each row of weights [rows, width] at u [rows] of its cumulative weight."""
    blocks = _blocks(weights)
    sums = _cumulative(blocks)
    return _first_reaching(blocks, sums, u * sums[:, -1], beyond=True)


def _blocks(weights: Floats) -> Floats:
    """[rows, width] → [rows, width / 64, 64], a view."""
    return weights.reshape(len(weights), -1, _BLOCK)


def _cumulative(blocks: Floats) -> Doubles:
    """[rows, n, 64] → [rows, n], the sum of all blocks up to and with each."""
    sums: Doubles = np.cumsum(blocks.sum(axis=2), axis=1, dtype=np.float64)
    return sums


def _first_reaching(blocks: Floats, sums: Doubles, target: Doubles, beyond: bool = False) -> Ints:
    """The first index in each row of blocks [rows, n, 64] where the cumulative weight reaches
    target [rows].

    sums: `_cumulative(blocks)`. beyond: exceeds instead of reaches; it is then a token of
    positive weight, rounding or not.
    """
    rows = np.arange(len(blocks))
    below = sums <= target[:, None] if beyond else sums < target[:, None]
    # where rounding leaves the target unreached: the last block that adds something
    last = np.count_nonzero(sums < sums[:, -1:], axis=1)
    block = np.minimum(np.count_nonzero(below, axis=1), last)
    inside = blocks[rows, block]
    before = np.where(block > 0, sums[rows, block - 1], 0.0)
    rest = (target - before)[:, None]
    cumulative = np.cumsum(inside, axis=1, dtype=np.float64)
    short = cumulative <= rest if beyond else cumulative < rest
    last = _BLOCK - 1 - np.argmax(inside[:, ::-1] > 0, axis=1)
    index: Ints = block * _BLOCK + np.minimum(np.count_nonzero(short, axis=1), last)
    return index


def _logprobs(row: Floats, token: int, top: int) -> TokenLogprobs:
    """Of the raw logits [vocab]: the chosen token's and the `top` most likely ones'."""
    largest = row.max()
    wide = row.astype(np.float64) - largest
    shift = np.log(np.exp(wide).sum())
    ids: Ints = np.zeros(0, dtype=np.int64)
    if top > 0:
        top = min(top, len(row))
        least = np.partition(row, len(row) - top)[len(row) - top]
        ids = np.flatnonzero(row >= least)
        ids = ids[np.argsort(-row[ids], kind="stable")][:top]
    return TokenLogprobs(
        float(wide[token] - shift),
        [int(i) for i in ids],
        [float(wide[i] - shift) for i in ids],
        int(np.count_nonzero(row > row[token])) + 1,
    )
