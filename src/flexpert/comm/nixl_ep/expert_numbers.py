"""From expert tables to the experts that nixl_ep numbers, and from its tensors to rows. Pure.

nixl_ep gives each rank the same number of experts, `slots`: expert e is slot e % slots of rank
e // slots. It returns room for `limit` rows a slot, of which some count. Here *place* is the number
of a row in [slots * limit]. Nothing in here reads a size from the device, so all can be captured.
"""

from __future__ import annotations

import torch

from flexpert.comm.buffer import ExpertTable


def numbered(
    expert_ids: torch.Tensor, table: ExpertTable, up: torch.Tensor, slots: int, dtype: torch.dtype
) -> torch.Tensor:
    """[tokens, k] of dtype: nixl_ep's numbers; -1 for none, and where the owner does not take part.

    expert_ids: [tokens, k] int. up: [capacity] bool, the ids that take part.
    """
    experts = table.rank.shape[0]
    if experts == 0:
        return torch.full_like(expert_ids, -1, dtype=dtype)
    at = expert_ids.long().clamp(0, experts - 1)
    owner, slot = table.rank[at].long(), table.slot[at].long()
    served = (expert_ids >= 0) & (expert_ids < experts) & (owner >= 0)
    served &= up[owner.clamp(0, up.shape[0] - 1)] & (owner < up.shape[0])
    return torch.where(served, owner * slots + slot, -1).to(dtype)


def once(numbers: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert at most once a token, with the sum of its weights: for more there is no room.

    numbers: [tokens, k] int; weights: [tokens, k] float32. The same are returned.
    """
    same = numbers[:, :, None] == numbers[:, None, :]
    again = same.tril(-1).any(2)
    summed = (same * weights[:, None, :]).sum(2)
    return numbers.masked_fill(again, -1), torch.where(again, 0.0, summed)


def packed(counts: torch.Tensor, limit: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by slot, without gaps.

    counts: [slots] int32, rows that arrived. most: rows that there may be.

    Returns:
        offsets [slots + 1] int32: rows of slot s are offsets[s] … offsets[s+1]-1.
        places [most] int32: of each row; slots * limit for those that did not come.
    """
    slots = counts.shape[0]
    offsets = torch.zeros(slots + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    row = torch.arange(most, dtype=torch.int32, device=counts.device)
    slot = torch.searchsorted(offsets[1:], row, right=True, out_int32=True)
    place = slot * limit + row - offsets[slot.long()]
    return offsets, torch.where(slot < slots, place, slots * limit).to(torch.int32)


def sources(ranges: torch.Tensor, places: torch.Tensor, limit: int) -> torch.Tensor:
    """[rows] int32: the home rank of each row.

    ranges: [slots, ranks] int64, begin << 32 | count of each source's rows. places: [rows] int32.
    """
    slot = torch.div(places, limit, rounding_mode="floor").long()
    at = (places - slot * limit)[:, None]
    begin, count = ranges[slot] >> 32, ranges[slot] & 0xFFFFFFFF
    return ((at >= begin) & (at < begin + count)).int().argmax(1).to(torch.int32)
