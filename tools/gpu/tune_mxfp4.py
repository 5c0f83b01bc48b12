"""Times products of few rows with MXFP4 weights on this GPU, in several ways, beside bf16's.

    PYTHONPATH=src python tools/gpu/tune_mxfp4.py [--tokens 1,2,4,8]

GPT-OSS' sizes: 32 experts, four for a token, hidden and inner 2880. Each figure is a replay of a
graph of launches with different routings, so that no weights stay in the L2 from one to the next;
the rate counts the weights of the experts in use once, with their scales. Every way is compared
with float64. Lines come as they are found.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tune_experts import microseconds

from flexpert.kernels import mxfp4
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.cuda import mxfp4_few
from flexpert.kernels.cuda import row_sorting as routing
from flexpert.kernels.cuda.grouped_products import choose, launched_rows
from flexpert.kernels.cuda.mxfp4_few import FewRowsTiling
from flexpert.kernels.weight_formats import MXFP4

EXPERTS, TOPK, HIDDEN, INNER = 32, 4, 2880, 2880
ROUTINGS = 8
PRODUCTS = {"up": (2 * INNER, False), "down": (HIDDEN, False), "gated": (2 * INNER, True)}


def table_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cuda")


def routings(tokens: int) -> list[Tensor]:
    """[tokens, TOPK] int64 each; one after the other has other experts, where there are enough."""
    found: list[Tensor] = []
    while len(found) < ROUTINGS:
        if tokens * TOPK > EXPERTS // 2:
            found.append(torch.rand(tokens, EXPERTS, device="cuda").topk(TOPK).indices)
        else:
            order = torch.randperm(EXPERTS, device="cuda")
            found.extend(order.view(-1, tokens, TOPK).unbind(0))
    return found[:ROUTINGS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--products", default=",".join(PRODUCTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), flush=True)
    began = time.monotonic()
    warm = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(200):  # a GPU that idles has a slow clock
        warm @ warm
    del warm
    for name in args.products.split(","):
        height, gated = PRODUCTS[name]
        codes = [
            torch.randint(0, 256, (height, HIDDEN // 2), dtype=torch.uint8, device="cuda")
            for _ in range(EXPERTS)
        ]
        scales = [
            torch.randint(116, 122, (height, HIDDEN // 32), dtype=torch.uint8, device="cuda")
            for _ in range(EXPERTS)
        ]
        whole = [mxfp4.dequantize(c, s).bfloat16() for c, s in zip(codes, scales, strict=True)]
        for tokens in map(int, args.tokens.split(",")):
            tune(name, gated, tokens, codes, scales, whole)
            print(f"  ({time.monotonic() - began:.0f} s)", flush=True)


def tune(
    name: str,
    gated: bool,
    tokens: int,
    codes: list[Tensor],
    scales: list[Tensor],
    whole: list[Tensor],
) -> None:
    valid = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    slot_of = torch.arange(EXPERTS, dtype=torch.int32, device="cuda")
    ids = routings(tokens)
    sorted_ = [routing.sort_by_slot(i, slot_of, valid, EXPERTS) for i in ids]
    indexed = name != "down"
    rows = tokens * TOPK
    x = torch.randn(tokens if indexed else rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    columns = whole[0].shape[0] // (2 if gated else 1)
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    packed, factors, unpacked = table_of(codes), table_of(scales), table_of(whole)
    active = statistics.mean(len(set(i.flatten().tolist())) for i in ids)
    nbytes = {4: codes[0].nbytes + scales[0].nbytes, 16: whole[0].nbytes}
    expected = [reference(x, s, whole, gated, indexed) for s in sorted_[:2]]

    def bf16(s: routing.SortedRows) -> object:
        return products.grouped_product(
            x, unpacked, s.offsets, out, index=s.token if indexed else None, gated=gated
        )

    def tiled(s: routing.SortedRows) -> object:
        return products.grouped_product(
            x, packed, s.offsets, out, index=s.token if indexed else None, packed=MXFP4,
            scales=factors, gated=gated, tiling=choose(rows, EXPERTS, gated=gated, packed=MXFP4),
        )  # fmt: skip

    ways: dict[str, tuple[int, Callable[[routing.SortedRows], object]]] = {
        "bf16": (16, bf16),
        "tiles": (4, tiled),
    }
    for warps in (1, 2, 4):
        for tiles in (1,) if gated else (1, 2):
            tiling = FewRowsTiling(warps, tiles)

            def few(s: routing.SortedRows, tiling: FewRowsTiling = tiling) -> object:
                return mxfp4_few.few_rows_product(
                    x, packed, factors, s.offsets, out, index=s.token if indexed else None,
                    biases=None, gated=gated, launched=launched_rows(rows, rows), tiling=tiling,
                )  # fmt: skip

            ways[f"few rows, {tiling}"] = (4, few)
    found = []
    for way, (bits, call) in ways.items():
        try:
            error = 0.0
            for s, wanted in zip(sorted_, expected, strict=False):
                out.fill_(float("nan"))
                call(s)
                error = max(error, float((out.double() - wanted).norm() / wanted.norm()))
            if not error < 1e-2:
                print(f"WRONG {name} {tokens} tokens {way}: error {error}", flush=True)
                continue
            took = microseconds([lambda s=s, call=call: call(s) for s in sorted_])
        except Exception as failure:  # noqa: BLE001 - what cannot be, is no candidate
            print(f"{name} {way}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
            continue
        moved = active * nbytes[bits]
        found.append((took, f"{moved / took / 1e6:5.2f} TB/s  error {error:.1e}  {way}"))
    print(f"{name} {tokens} tokens, {active:.1f} experts, {active * nbytes[4] / 1e6:.0f} MB:")
    for took, label in sorted(found):
        print(f"  {took:8.1f} us  {label}", flush=True)


def reference(
    x: Tensor, s: routing.SortedRows, whole: list[Tensor], gated: bool, indexed: bool
) -> Tensor:
    """In float64, in the order of the rows."""
    bounds = s.offsets.tolist()
    pieces = []
    for slot, weight in enumerate(whole):
        rows = slice(bounds[slot], bounds[slot + 1])
        if rows.start == rows.stop:
            continue
        taken = x[s.token[rows].long()] if indexed else x[rows]
        y = taken.double() @ weight.double().t()
        if gated:
            a, b = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(a) * b
        pieces.append(y)
    return torch.cat(pieces)


if __name__ == "__main__":
    main()
