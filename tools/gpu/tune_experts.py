"""Times every tiling of the experts' products on this GPU: what `products.choose` is made from.

    PYTHONPATH=src python tools/gpu/tune_experts.py [--shapes qwen3,deepseek] [--tokens 1,16,64,256]

Each figure is a replay of a graph of launches with different routings, so that no weights stay in
the L2 from one to the next; checked against float32 products of torch first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.cuda import row_sorting as routing
from flexpert.kernels.cuda.grouped_products import ProductTiling
from flexpert.kernels.weight_formats import FP8

SHAPES = {"qwen3": (128, 2048, 768), "deepseek": (256, 7168, 2048)}
TOPK = 8
ROUTINGS = 6

TILINGS = [
    ProductTiling(16, 64, 128, 4, 4, True),
    ProductTiling(16, 64, 128, 4, 3, True),
    ProductTiling(16, 64, 256, 4, 2, True),
    ProductTiling(16, 128, 64, 4, 4, True),
    ProductTiling(16, 128, 128, 8, 3, True),
    ProductTiling(16, 32, 128, 4, 4, False),
    ProductTiling(16, 64, 128, 4, 4, False),
    ProductTiling(16, 32, 256, 4, 3, False),
    ProductTiling(32, 64, 128, 4, 3, True),
    ProductTiling(32, 128, 64, 4, 4, True),
    ProductTiling(32, 128, 128, 8, 3, True),
    ProductTiling(64, 64, 64, 4, 4, True),
    ProductTiling(64, 128, 64, 4, 3, True),
    ProductTiling(64, 128, 64, 8, 4, True),
    ProductTiling(128, 128, 64, 8, 3, False),
    ProductTiling(128, 128, 64, 8, 4, False),
    ProductTiling(128, 128, 64, 4, 3, False),
    ProductTiling(128, 256, 64, 8, 3, False),
]

TILINGS_FP8 = [
    ProductTiling(16, 64, 128, 4, 4, False),
    ProductTiling(16, 32, 128, 4, 5, False),
    ProductTiling(16, 128, 128, 8, 4, False),
    ProductTiling(16, 64, 128, 4, 6, True),
    ProductTiling(32, 64, 128, 4, 4, False),
    ProductTiling(32, 128, 128, 4, 3, False),
    ProductTiling(32, 128, 128, 8, 3, False),
    ProductTiling(64, 64, 128, 4, 3, True),
    ProductTiling(64, 128, 64, 4, 4, False),
    ProductTiling(64, 128, 128, 8, 3, True),
    ProductTiling(128, 64, 64, 4, 4, True),
    ProductTiling(128, 128, 64, 8, 3, True),
    ProductTiling(128, 256, 64, 8, 3, False),
]


def microseconds(launches: Sequence[Callable[[], object]]) -> float:
    """Median time of one launch, in replays of a graph of all."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def candidates(rows: int, experts: int, scaled: bool) -> list[ProductTiling]:
    each = rows / min(rows, experts)
    every = TILINGS_FP8 if scaled else TILINGS
    return [t for t in every if each / 6 <= t.rows <= max(16, 8 * each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen3,deepseek")
    parser.add_argument("--tokens", default="1,16,64,256,1024,4096")
    parser.add_argument("--waves", default="1,2,4,0")
    parser.add_argument("--fp8", action="store_true", help="weights in fp8")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    for shape in args.shapes.split(","):
        experts, hidden, inter = SHAPES[shape]
        up = torch.empty(experts, 2 * inter, hidden, dtype=torch.bfloat16, device="cuda")
        down = torch.empty(experts, hidden, inter, dtype=torch.bfloat16, device="cuda")
        for w in (*up, *down):
            w.normal_(std=w.shape[1] ** -0.5)
        slot_of = torch.arange(experts, dtype=torch.int32, device="cuda")
        for tokens in map(int, args.tokens.split(",")):
            waves = list(map(int, args.waves.split(",")))
            tune(shape, tokens, up, down, slot_of, waves, args.fp8)
        del up, down


def tune(
    shape: str,
    tokens: int,
    up: Tensor,
    down: Tensor,
    slot_of: Tensor,
    waves: list[int],
    scaled: bool,
) -> None:
    experts, hidden, inter = down.shape
    valid = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    ids = [torch.rand(tokens, experts, device="cuda").topk(TOPK).indices for _ in range(ROUTINGS)]
    sorted_ = [routing.sort_by_slot(i, slot_of, valid, experts) for i in ids]
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    rows = tokens * TOPK
    h = torch.randn(rows, inter, device="cuda", dtype=torch.bfloat16)
    h_out, y_out = torch.empty_like(h), x.new_empty(rows, hidden)

    def table_of(tensors: Sequence[Tensor]) -> Tensor:
        return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cuda")

    for name, gated in (("gate_up", True), ("down", False)):
        weights = up if gated else down
        active = statistics.mean(len(set(i.flatten().tolist())) for i in ids)
        out = h_out if gated else y_out
        table, scales = table_of(weights), None
        if scaled:
            eighths = [fp8.quantize(w) for w in weights]
            weights = torch.stack([fp8.dequantize(*pair).bfloat16() for pair in eighths])
            table = table_of([pair[0] for pair in eighths])
            scales = table_of([pair[1] for pair in eighths])
        moved = active * weights[0].nbytes / (2 if scaled else 1)
        flops = 2 * rows * weights[0].numel()
        found: list[tuple[float, str]] = []
        expected = reference(x if gated else h, sorted_[0], weights, gated)
        for tiling in candidates(rows, experts, scaled):
            for wave in waves:
                t = ProductTiling(
                    *[getattr(tiling, f) for f in ProductTiling.__slots__[:-1]], waves=wave
                )

                def launch(s: routing.SortedRows, t: ProductTiling = t) -> Callable[[], object]:
                    return lambda: products.grouped_product(
                        x if gated else h,
                        table,
                        s.offsets,
                        out,
                        index=s.token if gated else None,
                        packed=FP8 if scaled else None,
                        scales=scales,
                        gated=gated,
                        tiling=t,
                    )

                try:
                    out.fill_(float("nan"))
                    launch(sorted_[0])()
                    error = float((out.float() - expected).norm() / expected.norm())
                    if not error < 1e-2:
                        print(f"WRONG {shape} {tokens} {name} {t}: {error}")
                        continue
                    time = microseconds([launch(s) for s in sorted_])
                except Exception as failure:  # noqa: BLE001 - shared memory, registers: no candidate
                    print(f"{t}: {type(failure).__name__} {str(failure)[:80]}")
                    break
                label = f"{t.rows}x{t.columns}x{t.depth} w{t.warps} s{t.stages} "
                found.append((time, f"{label}{'swap' if t.swap else 'row '} waves {t.waves}"))
        library = microseconds(
            [library_product(x if gated else h, s, weights, gated) for s in sorted_]
        )
        found.sort()
        print(
            f"{shape} {tokens} tokens {name}: torch grouped_mm {library:.1f} us; "
            f"{moved / 1e6:.0f} MB, {flops / 1e9:.0f} GFLOP",
            flush=True,
        )
        seen: set[str] = set()
        for time, label in found:
            kind = label.split(" waves")[0]
            if kind in seen or len(seen) == 5:
                continue
            seen.add(kind)
            print(
                f"    {time:9.1f} us  {moved / time / 1e6:5.2f} TB/s {flops / time / 1e6:6.1f} "
                f"TFLOP/s  {label}",
                flush=True,
            )


def library_product(
    x: Tensor, s: routing.SortedRows, weights: Tensor, gated: bool
) -> Callable[[], object]:
    """What torch has: gather, grouped_mm, gate."""
    turned = weights.transpose(1, 2)
    ends = s.offsets[1:].contiguous()
    token = s.token.long()

    def call() -> Tensor:
        y = torch.nn.functional.grouped_mm(x[token] if gated else x, turned, offs=ends)
        if gated:
            a, b = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(a) * b
        return y

    return call


def reference(x: Tensor, s: routing.SortedRows, weights: Tensor, gated: bool) -> Tensor:
    bounds = s.offsets.tolist()
    pieces = []
    for slot in range(weights.shape[0]):
        rows = slice(bounds[slot], bounds[slot + 1])
        taken = x[s.token[rows].long()] if gated else x[rows]
        y = taken.float() @ weights[slot].float().t()
        if gated:
            a, b = y.chunk(2, dim=-1)
            y = torch.nn.functional.silu(a) * b
        pieces.append(y)
    return torch.cat(pieces)


if __name__ == "__main__":
    main()
