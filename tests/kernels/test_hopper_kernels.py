"""What of the kernels for Hopper can be followed without one."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")

from flexpert.kernels import mxfp4
from flexpert.kernels.cuda import hopper_attention, mxfp4_few

Registers = dict[str, float]


def bf16_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF) << 16))[0])


def bits_of(value: float) -> int:
    return int(torch.tensor(value).bfloat16().view(torch.int16)) & 0xFFFF


def words_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32).long() & 0xFFFFFFFF


class Warp:
    """32 lanes that follow the PTX of `mxfp4_few`."""

    def __init__(self, lanes: list[Registers]) -> None:
        self.lanes = lanes

    def run(self, text: str) -> None:
        for line in text.strip("{}\n").splitlines():
            name, rest = line.rstrip(";").split(" ", 1)
            if name.startswith("mma"):
                self.multiply(*(g.split(", ") for g in re.findall(r"{([^}]*)}", rest)))
            elif not name.startswith(".reg"):
                for lane in self.lanes:
                    to, *sources = rest.split(", ")
                    values = [lane[s] if s in lane else int(s, 0) for s in sources]
                    lane[to] = self.value(name.split(".")[0], values)

    def value(self, name: str, values: list[float]) -> float:
        if name == "mov":
            return values[0]
        a, b, *more = map(int, values)
        if name == "shr":
            return a >> b
        if name == "and":
            return a & b
        if name == "mul":
            return a * b & 0xFFFFFFFF
        if name == "prmt":
            both = a | b << 32
            return sum((both >> 8 * (more[0] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        assert name == "fma"
        parts = [[bf16_of(v >> shift) for v in (a, b, *more)] for shift in (0, 16)]
        low, high = (bits_of(x * y + z) for x, y, z in parts)
        return low | high << 16

    def multiply(self, d: list[str], a: list[str], b: list[str], c: list[str]) -> None:
        """As PTX lays out the operands of mma.m16n8k16."""
        left, right = torch.zeros(16, 16), torch.zeros(16, 8)
        for index, lane in enumerate(self.lanes):
            row, pair = index // 4, index % 4 * 2
            for half in (0, 1):
                for i, name in enumerate(a):
                    at = row + i % 2 * 8, pair + i // 2 * 8 + half
                    left[at] = bf16_of(int(lane[name]) >> 16 * half)
                for i, name in enumerate(b):
                    right[pair + i * 8 + half, row] = bf16_of(int(lane[name]) >> 16 * half)
        product = left @ right
        for index, lane in enumerate(self.lanes):
            for i, (to, so_far) in enumerate(zip(d, c, strict=True)):
                at = index // 4 + i // 2 * 8, index % 4 * 2 + i % 2
                lane[to] = lane[so_far] + float(product[at])


def test_a_warp_multiplies_weights_in_the_order_in_which_they_lie() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (16, 64), dtype=torch.uint8)
    scales = torch.randint(118, 130, (16, 4), dtype=torch.uint8)
    x = torch.randn(8, 128).bfloat16()
    weights, rows = words_of(codes), words_of(x)
    ordering: list[Registers] = [
        {f"${16 + i}": int(rows[lane // 4, lane % 4 * 16 + i]) for i in range(16)}
        for lane in range(32)
    ]
    Warp(ordering).run(mxfp4_few._ordered())
    lanes: list[Registers] = []
    for index, ordered in enumerate(ordering):
        row, block = index // 4, index % 4
        lane: Registers = {f"${16 + i}": ordered[f"${i}"] for i in range(16)}
        for i in range(4):
            lane[f"${4 + i}"] = int(weights[row, block * 4 + i])
            lane[f"${8 + i}"] = int(weights[row + 8, block * 4 + i])
            # as `_factor` has it
            lane[f"${12 + i}"] = (int(scales[row + i % 2 * 8, block]) + 94 << 7) * 0x10001
            lane[f"${32 + i}"] = 0.0
        lanes.append(lane)
    Warp(lanes).run(mxfp4_few._multiplied())
    out = torch.zeros(8, 16)
    for index, lane in enumerate(lanes):
        for i in range(4):
            out[index % 4 * 2 + i % 2, index // 4 + i // 2 * 8] = lane[f"${i}"] * 2**32
    expected = x.float() @ mxfp4.dequantize(codes, scales).t()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", [8, 16, 64, 256])
@pytest.mark.parametrize(("keys", "dim", "warps"), [(128, 128, 8), (64, 128, 8), (64, 64, 4)])
def test_each_number_of_a_tile_is_copied_by_one_lane(
    keys: int, dim: int, warps: int, block: int
) -> None:
    tile = hopper_attention.layouts(keys, block, dim, warps)["TILE"]
    bases = [*tile.reg_bases, *tile.lane_bases, *tile.warp_bases]
    every = [[1 << i, 0] for i in range(keys.bit_length() - 1)]
    every += [[0, 1 << i] for i in range(dim.bit_length() - 1)]
    assert sorted(bases) == sorted(every)
    assert len(tile.lane_bases) == 5
    assert 1 << len(tile.warp_bases) == warps
