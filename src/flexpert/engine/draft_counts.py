"""What became of proposed tokens, as ranks tell the head. Pure."""

from __future__ import annotations

import msgspec


class DraftCounts(msgspec.Struct, frozen=True, array_like=True):
    """What became of proposed tokens. drafts: runs of them. tokens: in all of them. accepted: how
    many runs had their first token come true, their second one, and so on."""

    drafts: int
    tokens: int
    accepted: list[int]

    def __add__(self, other: DraftCounts) -> DraftCounts:
        both = self.accepted, other.accepted
        short, long = sorted(both, key=len)
        accepted = [*map(sum, zip(short, long, strict=False)), *long[len(short) :]]
        return DraftCounts(self.drafts + other.drafts, self.tokens + other.tokens, accepted)
