"""A service and another OpenAI server of the same machine, under the same load in turn.

In turn, because a machine is not the same from one minute to the next; random prompts are others in
each round, because prefix caches would know them.
"""

from __future__ import annotations

from statistics import median

import msgspec

from flexpert.bench.load import LoadError, Target, call, error_message
from flexpert.bench.statistics import Figures, Summary


class ServerTurn(msgspec.Struct, frozen=True):
    """One turn of each, with the same prompts."""

    ours: Figures
    theirs: Figures


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. url, model: of the other server. Ratios are those of medians over rounds,
    ours over theirs: of output tokens/s more is better, of times less; None: nothing was answered.
    """

    url: str
    model: str
    rounds: list[ServerTurn]
    tokens_ratio: float | None
    first_token_ratio: float | None
    inter_token_ratio: float | None

    @classmethod
    def of(cls, url: str, model: str, rounds: list[ServerTurn]) -> Against:
        return cls(
            url=url,
            model=model,
            rounds=rounds,
            tokens_ratio=_ratio(
                [turn.ours.output_tokens_per_s for turn in rounds],
                [turn.theirs.output_tokens_per_s for turn in rounds],
            ),
            first_token_ratio=_ratio(
                _means([turn.ours.first_token_ms for turn in rounds]),
                _means([turn.theirs.first_token_ms for turn in rounds]),
            ),
            inter_token_ratio=_ratio(
                _means([turn.ours.inter_token_ms for turn in rounds]),
                _means([turn.theirs.inter_token_ms for turn in rounds]),
            ),
        )

    @property
    def failed(self) -> int:
        """Requests of either server."""
        return sum(turn.ours.failed + turn.theirs.failed for turn in self.rounds)

    @property
    def middle(self) -> ServerTurn:
        """The round in which ours was neither fastest nor slowest."""
        ordered = sorted(self.rounds, key=lambda turn: turn.ours.output_tokens_per_s)
        return ordered[len(ordered) // 2]


async def served_model(target: Target) -> str:
    """The name by which a server's first model is asked for.

    Raises: LoadError: it does not say.
    """
    status, answer = await call(target, "GET", "/v1/models")
    try:
        if status == 200:
            return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        pass  # another server's answer may be anything
    said = error_message(msgspec.json.encode(answer))
    raise LoadError(f"/v1/models answered {status} and names no model: {said}")


def _means(found: list[Summary | None]) -> list[float]:
    return [summary.mean for summary in found if summary is not None]


def _ratio(ours: list[float], theirs: list[float]) -> float | None:
    if not ours or not theirs or not median(theirs):
        return None
    return median(ours) / median(theirs)
