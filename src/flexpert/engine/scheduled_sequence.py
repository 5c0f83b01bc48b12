"""A sequence in a scheduler: its tokens, its blocks, how far it is computed. Pure."""

from __future__ import annotations

from flexpert.engine.request import RequestSequence, TokenLogprobs
from flexpert.engine.sequence import SampleState
from flexpert.engine.speculation import SequenceSpeculation
from flexpert.engine.state_slots import SequenceState


class ScheduledSequence(SampleState):
    """A sequence in this scheduler. While it waits row is -1, and it has blocks only if it came
    with them (`adopt`)."""

    __slots__ = (
        "aborted",
        "added",
        "blocks",
        "cached",
        "computed",
        "digests",
        "row",
        "scores",
        "speculation",
        "state",
        "tainted",
        "waited",
    )

    def __init__(self, sequence: RequestSequence, added: float) -> None:
        super().__init__(sequence)
        self.added = added  # when, by the scheduler's clock
        self.waited: float | None = None  # seconds until it was first admitted
        self.blocks: list[int] = []
        self.computed = 0  # tokens whose keys and values are in the blocks
        self.digests: list[bytes] = []  # of the first full blocks of `tokens`
        self.row = -1  # in the scheduler's arrays
        self.aborted = False  # while a plan that may hold it is in flight
        self.tainted = False  # keys and values in the blocks were computed without some experts
        self.cached = 0  # tokens of the prompt that were found in the cache
        self.state = SequenceState()
        self.speculation: SequenceSpeculation | None = None  # while it decodes, if it may
        # log probabilities of the prompt's tokens from the second on, as far as it is computed;
        # None: not asked for, or published
        asked = sequence.params.prompt_logprobs is not None and not sequence.generated
        self.scores: list[TokenLogprobs] | None = [] if asked else None
