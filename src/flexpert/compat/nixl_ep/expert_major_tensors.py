"""From rows sorted by slot to nixl_ep's expert-major tensors, and back. Pure.

Our exchange gives the rows that arrived packed: [rows], by slot, then source rank, then token.
nixl_ep gives each local expert room for `limit` rows and says how many of them count. Within an
expert the order is the same, so each packed row has one place: `places`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class Arrival:
    """Which rows a dispatch brought, and where they belong.

    per_expert: [experts] int64, rows of each local expert.
    counts: [experts, ranks] int64, of these from each source rank.
    places: [rows] int64, where each packed row lies in [experts * limit].
    """

    per_expert: torch.Tensor
    counts: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, offsets: torch.Tensor, source: torch.Tensor, ranks: int, limit: int) -> Arrival:
        """What `Received` tells.

        offsets: [experts + 1] int32; rows of local expert e are offsets[e] … offsets[e+1]-1.
        source: [rows] int32, the home rank of each row, below `ranks`.
        limit: rows that an expert has room for.

        Raises: ValueError: an expert has more, or a row is from a rank beyond `ranks`.
        """
        begin = offsets.to(torch.int64)
        per_expert = begin.diff()
        most = int(per_expert.max())
        if most > limit:
            raise ValueError(
                f"{most} rows for one expert, but nixl_ep's layout has room for {limit}: a token "
                "chose an expert twice, or ranks dispatch with different "
                "num_max_dispatch_tokens_per_rank"
            )
        experts, rows = per_expert.shape[0], source.shape[0]
        if rows and int(source.max()) >= ranks:
            raise ValueError(
                f"rows of rank {int(source.max())} arrived, but the tensors are for {ranks} ranks: "
                "it was unmasked from another thread during a dispatch"
            )
        expert = torch.repeat_interleave(per_expert, output_size=rows)
        counts = (expert * ranks).add_(source).bincount(minlength=experts * ranks)
        # place = expert * limit + (row - begin[expert])
        first = torch.arange(0, experts * limit, limit, dtype=torch.int64, device="cpu")
        row = torch.arange(rows, dtype=torch.int64, device="cpu")
        places = first.sub_(begin[:-1])[expert] + row
        return cls(per_expert, counts.view(experts, ranks), places)

    def layout_range(self) -> torch.Tensor:
        """[experts, ranks] int64: begin << 32 | count of the rows of each source in each expert."""
        begin = self.counts.cumsum(1).sub_(self.counts)
        return begin.bitwise_left_shift_(32).bitwise_or_(self.counts)

    def places_from(self, ranks: torch.Tensor) -> torch.Tensor:
        """`places` of the rows that came from these ranks.

        ranks: [ranks] bool.
        """
        each = ranks.repeat(self.counts.shape[0])
        return self.places[torch.repeat_interleave(each, self.counts.flatten())]


def collect(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """Take the rows at these places of an expert-major tensor.

    x: [experts, limit, width]; out: [rows, at least width] of the same dtype.
    """
    flat = x.reshape(-1, x.shape[2])
    if out.shape[1] == flat.shape[1]:
        torch.index_select(flat, 0, places, out=out)
    else:
        out[:, : flat.shape[1]] = flat[places]


def widened(x: torch.Tensor, hidden: int) -> torch.Tensor:
    """x with zeros up to `hidden` channels in its last dimension; contiguous."""
    missing = hidden - x.shape[-1]
    return pad(x, (0, missing)) if missing else x.contiguous()


def column_major(storage: torch.Tensor) -> torch.Tensor:
    """[experts, columns, limit], contiguous → [experts, limit, columns] in the same memory."""
    return storage.transpose(1, 2)


def spread(rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """Put packed rows into their places; the rest of `out` stays as it is.

    rows: [rows, columns]; out: [experts, limit, columns], with any strides.
    """
    limit = out.shape[1]
    expert = torch.div(places, limit, rounding_mode="floor")
    out[expert, places - expert * limit] = rows
