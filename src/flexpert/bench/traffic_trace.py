"""Recorded requests, with their times and lengths, as a load.

Two public formats are read, each line of a file one request:

    Mooncake    JSON lines: timestamp (ms), input_length, output_length, hash_ids of the blocks of
                512 tokens that the prompt begins with
    BurstGPT    CSV with a header: Timestamp (s), Request tokens, Response tokens

Neither holds what was said. Prompts are random tokens of the same length; equal hash ids are equal
blocks, so that a prefix cache finds as much as it would have.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from flexpert.bench.prompts import Prompt
from flexpert.errors import ConfigError
from flexpert.reading import read_text, shown

BLOCK_TOKENS = 512
_MOST_BYTES = 1 << 28
_MOST_TOKENS = 1 << 24  # of a prompt or an answer
_MOST_S = 366 * 86400.0

_TIMESTAMP, _REQUEST, _RESPONSE = "Timestamp", "Request tokens", "Response tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRequest:
    """at: seconds from the first. blocks: hash ids of the prompt's blocks, none or all of them."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficTrace:
    """left_out: lines without an answer, which failed when they were recorded."""

    file: Path
    requests: tuple[RecordedRequest, ...]
    left_out: int = 0

    def fitting(self, most_tokens: int | None) -> TrafficTrace:
        """Without the requests that are longer than the service takes; None: it takes all.

        Raises: ConfigError: it takes none.
        """
        if most_tokens is None:
            return self
        kept = tuple(r for r in self.requests if r.input_tokens + r.output_tokens <= most_tokens)
        if not kept:
            raise ConfigError(
                f"--trace {self.file}: every request is longer than the {most_tokens} tokens that "
                "the service takes"
            )
        left_out = self.left_out + len(self.requests) - len(kept)
        return replace(self, requests=kept, left_out=left_out)

    def prompts(self, pool: Sequence[int], seed: int) -> list[Prompt]:
        """Of all requests, of tokens of the pool."""
        blocks: dict[int, list[int]] = {}
        return [self.prompt(number, pool, seed, blocks) for number in range(len(self.requests))]

    def prompt(
        self, number: int, pool: Sequence[int], seed: int, blocks: dict[int, list[int]]
    ) -> list[int]:
        """Of one request. blocks: those that were made for others; more are added."""
        request = self.requests[number]
        tokens: list[int] = []
        for block in request.blocks:
            if block not in blocks:
                blocks[block] = _tokens(pool, BLOCK_TOKENS, f"{seed} block {block}")
            tokens += blocks[block]
        if not tokens:
            tokens = _tokens(pool, request.input_tokens, f"{seed} request {number}")
        return tokens[: request.input_tokens]


def _tokens(pool: Sequence[int], count: int, seed: str) -> list[int]:
    return random.Random(seed).choices(pool, k=count)


class _MooncakeLine(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(file: Path, *, count: int | None = None, speedup: float = 1.0) -> TrafficTrace:
    """The first `count` requests of a trace, so many times as fast.

    Raises:
        ConfigError: unreadable, empty, or a line that is no request.
    """
    lines = read_text(file, "the trace", most=_MOST_BYTES).splitlines()
    first = next((line for line in lines if line.strip()), "")
    read = _mooncake if first.lstrip().startswith("{") else _burstgpt
    requests: list[RecordedRequest] = []
    left_out = 0
    for number, request in read(file, lines):
        _check(file, number, request)
        if count is not None and len(requests) == count:
            break
        if request.output_tokens == 0:
            left_out += 1
            continue
        requests.append(request)
    if not requests:
        raise ConfigError(f"there is no request in {file}")
    requests.sort(key=lambda request: request.at)
    begin = requests[0].at
    moved = (replace(request, at=(request.at - begin) / speedup) for request in requests)
    return TrafficTrace(file=file, requests=tuple(moved), left_out=left_out)


def _mooncake(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, RecordedRequest]]:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(f"{file} line {number} is no request of a trace: {error}") from None
        yield (
            number,
            RecordedRequest(
                at=found.timestamp / 1e3,
                input_tokens=found.input_length,
                output_tokens=found.output_length,
                blocks=tuple(found.hash_ids),
            ),
        )


def _burstgpt(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, RecordedRequest]]:
    reader = csv.reader(lines)
    header: list[str] = []
    try:
        for row in reader:
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                missing = {_TIMESTAMP, _REQUEST, _RESPONSE} - set(header)
                if missing:
                    raise ConfigError(
                        f"{file} is no trace: neither JSON lines with 'timestamp', 'input_length' "
                        f"and 'output_length', nor CSV with the columns {_TIMESTAMP}, {_REQUEST} "
                        f"and {_RESPONSE}"
                    )
                continue
            cells = dict(zip(header, row, strict=False))
            yield (
                reader.line_num,
                RecordedRequest(
                    at=float(cells[_TIMESTAMP]),
                    input_tokens=_whole(cells[_REQUEST]),
                    output_tokens=_whole(cells[_RESPONSE]),
                ),
            )
    except KeyError as error:
        raise ConfigError(
            f"{file} line {reader.line_num} is no request of a trace: it has no {error}"
        ) from None
    except (ValueError, OverflowError, csv.Error) as error:
        raise ConfigError(
            f"{file} line {reader.line_num} is no request of a trace: {shown(str(error))}"
        ) from None


def _whole(text: str) -> int:
    """Raises: ValueError, OverflowError"""
    value = float(text)
    if value != int(value):
        raise ValueError(f"{text} is no number of tokens")
    return int(value)


def _check(file: Path, number: int, request: RecordedRequest) -> None:
    """Raises: ConfigError"""
    wrong = None
    if not 0 <= request.at <= _MOST_S or math.isnan(request.at):
        wrong = f"its time is {request.at:g} s"
    elif not 1 <= request.input_tokens <= _MOST_TOKENS:
        wrong = f"its prompt has {request.input_tokens} tokens"
    elif not 0 <= request.output_tokens <= _MOST_TOKENS:
        wrong = f"its answer has {request.output_tokens} tokens"
    elif request.blocks and len(request.blocks) != -(-request.input_tokens // BLOCK_TOKENS):
        wrong = (
            f"{len(request.blocks)} hash_ids of blocks of {BLOCK_TOKENS} tokens do not make a "
            f"prompt of {request.input_tokens}"
        )
    if wrong:
        raise ConfigError(f"{file} line {number} is no request of a trace: {wrong}")
