"""`--deterministic` on a GPU: rows have the same bits in any company, seen on the GPU's arithmetic.

Each kernel is called with few and many rows, which choose other tilings; then a service answers 64
clients as it answers one at a time, on one rank and on two, through changes
(tools/gpu/deterministic.py).
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexpert.kernels.cuda import fixed_attention, fixed_products, fixed_rows, norm, rotary, router
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.cuda.sampling import choose_tokens
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat

ROWS = (1, 2, 7, 16, 33, 64, 96, 200, 256, 1000, 2048)
TOOLS = Path(__file__).parents[2] / "tools/gpu"


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def different(few: Tensor, many: Tensor) -> int:
    """Rows that are not the same, bit for bit."""
    return int((few != many).flatten(1).any(1).sum())


def batches() -> list[slice]:
    """Of the rows of a large batch, at its begin, its end, and anywhere."""
    most = ROWS[-1]
    return [
        slice(begin, begin + rows)
        for rows in ROWS
        for begin in sorted({0, (most - rows) // 3, most - rows})
    ]


SHAPES = {
    "qkv": (5120, 2048),
    "output": (2048, 4096),
    "router": (128, 2048),
    "head": (32000, 2048),
    "odd": (2881, 2880),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_linear_layers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    columns, depth = shape
    weight, bias = randn(columns, depth, dtype=dtype) / 50, randn(columns, dtype=dtype)
    x = randn(ROWS[-1], depth, dtype=dtype)
    fixed = fixed_products.FixedProducts(x.device)
    whole = fixed.linear(x, weight, bias)
    expected = x.double() @ weight.double().t() + bias.double()
    assert float((whole.double() - expected).norm() / expected.norm()) < 4e-3
    wrong = {
        (rows.stop - rows.start, rows.start): bad
        for rows in batches()
        if (bad := different(fixed.linear(x[rows], weight, bias), whole[rows]))
    }
    assert not wrong, f"(rows, first of them): how many differ: {wrong}"


ATTENTION = {
    "plain": {},
    "window": {"window": 700},
    "chunks": {"window": -700},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
}
HEADS = {"gqa": (32, 4, (128, 128)), "mla": (16, 16, (192, 128)), "64": (24, 8, (64, 64))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", ATTENTION.values(), ids=list(ATTENTION))
@pytest.mark.parametrize("shape", HEADS.values(), ids=list(HEADS))
def test_attention(
    shape: tuple[int, int, tuple[int, int]], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """The last 300 tokens of sequences: all at once, in pieces, and one by one in any batch."""
    heads, kv_heads, dims = shape
    block, last = 16, 300
    lengths = [301, 511, 512, 513, 1500, 2100, 4096]
    most = -(-max(lengths) // block)
    tables = torch.randperm(most * len(lengths), device="cuda").int().view(len(lengths), most)
    keys, values = (randn(most * len(lengths), block, kv_heads, d, dtype=dtype) for d in dims)
    queries = randn(len(lengths), last, heads, dims[0], dtype=dtype)
    more = dict(options, scaling=0.2)
    if "sinks" in more:
        more["sinks"] = randn(heads, dtype=dtype)

    def attend(pieces: list[tuple[int, int, int]], **how: Any) -> list[Tensor]:
        """pieces: (sequence, first and behind the last of its 300 rows)."""
        counts = [end - begin for _, begin, end in pieces]
        contexts = [lengths[s] - last + end for s, _, end in pieces]
        out = fixed_attention.attend(
            torch.cat([queries[s, begin:end] for s, begin, end in pieces]),
            keys,
            values,
            torch.tensor([0, *counts], device="cuda").cumsum(0).int(),
            torch.tensor(contexts, device="cuda").int(),
            tables[[s for s, _, _ in pieces]].contiguous(),
            **more,
            **how,
        )
        return list(out.split(counts))

    every = range(len(lengths))
    whole = attend([(s, 0, last) for s in every])
    cuts = [0, 1, 8, 71, 200, 299, 300]
    for begin, end in itertools.pairwise(cuts):
        for group in ([(s, begin, end) for s in every], *([(s, begin, end)] for s in every)):
            for (s, _, _), found in zip(group, attend(group), strict=True):
                assert torch.equal(found, whole[s][begin:end]), f"rows {begin} to {end} of {s}"
    for batch in (1, 7, 64, 200):
        group = [(i % len(lengths), i * 7 % last, i * 7 % last + 1) for i in range(batch)]
        for splits in (None, 1, 2, 8):
            for (s, row, _), found in zip(group, attend(group, splits=splits), strict=True):
                assert torch.equal(found[0], whole[s][row]), f"row {row} of {s}, batch {batch}"


@pytest.mark.parametrize("packed", [None, FP8, MXFP4], ids=["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_experts(gated: bool, packed: WeightFormat | None) -> None:
    """A row of an expert alone, and among up to 300 for each expert."""
    slots, hidden, inter = 4, 2048, 768
    height = 2 * inter if gated else inter
    whole = [torch.randn(height, hidden).bfloat16() / 50 for _ in range(slots)]
    weights, scales = [w.cuda() for w in whole], None
    if packed is not None:
        pairs = [packed.quantize(weight) for weight in whole]
        weights, scales = [p[0].cuda() for p in pairs], [p[1].cuda() for p in pairs]
    biases = [randn(height) for _ in range(slots)]
    x = randn(slots, 300, hidden)

    def product(each: int) -> Tensor:
        """[slots, each, inter] of the last rows of each expert."""
        rows = x[:, 300 - each :].contiguous().view(slots * each, hidden)
        return products.grouped_product(
            rows,
            addresses(weights),
            torch.arange(slots + 1, dtype=torch.int32, device="cuda") * each,
            torch.empty(slots * each, inter, dtype=torch.bfloat16, device="cuda"),
            packed=packed,
            scales=None if scales is None else addresses(scales),
            biases=addresses(biases),
            gated=gated,
            deterministic=True,
        ).view(slots, each, inter)

    many = product(300)
    for each in (1, 2, 5, 8, 9, 33, 64, 129, 200):
        assert torch.equal(product(each), many[:, 300 - each :]), f"{each} rows an expert"


def test_norms_routers_rotations_and_sums_of_rows() -> None:
    x = randn(ROWS[-1], 2048)
    short = randn(ROWS[-1], 128)
    weight, of_short = randn(2048), randn(128)
    qkv, angles = randn(ROWS[-1], 12, 128), randn(ROWS[-1], 128)
    slots = torch.arange(ROWS[-1], device="cuda")

    def rotated(rows: slice) -> Tensor:
        caches = [torch.zeros(ROWS[-1], 1, 2, 128, device="cuda", dtype=x.dtype) for _ in range(2)]
        query = rotary.rotate_and_store(
            qkv[rows], angles[rows], angles[rows], slots[rows], caches[0], caches[1],
            norms=(of_short, of_short), eps=1e-6, early=True,
        )  # fmt: skip
        return torch.cat([query, *(cache[rows].squeeze(1) for cache in caches)], 1)

    def chosen(rows: slice) -> Tensor:
        weights, ids = router.choose_experts(
            short[rows], 8, normalised=True, dtype=torch.float32, deterministic=True
        )
        return torch.cat([weights, ids.float()], 1)

    kernels = {
        "norm": lambda rows: norm.rms_norm(x[rows], weight, 1e-6, early=True),
        "norm of heads": lambda rows: norm.rms_norm(short[rows], of_short, 1e-6, early=False),
        "rotary": rotated,
        "router": chosen,
        "sum": lambda rows: fixed_rows.sum_rows(x[rows])[:, None],
        "mean": lambda rows: fixed_rows.mean_rows(short[rows])[:, None],
        "softmax": lambda rows: fixed_rows.softmax_rows(short[rows]),
        "layer norm": lambda rows: fixed_rows.layer_norm_rows(x[rows], weight, weight, 1e-6),
    }
    for name, kernel in kernels.items():
        whole = kernel(slice(None))
        for rows in batches():
            assert torch.equal(kernel(rows), whole[rows]), f"{name} of {rows}"


def test_sampling() -> None:
    logits = randn(256, 32003, dtype=torch.float32) * 3
    settings = torch.rand(5, 256, dtype=torch.float64, device="cuda")
    settings[0], settings[1] = 1.0, 0.001
    settings[3] = torch.randint(1, 32003, (256,), device="cuda")

    def tokens(rows: slice) -> Tensor:
        out = torch.empty(len(logits[rows]), dtype=torch.int64, device="cuda")
        choose_tokens(logits[rows], settings[:, rows].contiguous(), out)
        return out

    whole = tokens(slice(None))
    for begin, rows in ((0, 1), (3, 1), (5, 7), (100, 64), (56, 200)):
        assert torch.equal(tokens(slice(begin, begin + rows)), whole[begin : begin + rows])


@pytest.mark.parametrize("served", ["tiny", "wide"])
def test_a_service_answers_many_as_it_answers_one(served: str, tmp_path: Path) -> None:
    """On two ranks where there are two GPUs, through leaves, joins and a kill."""
    several = torch.cuda.device_count() > 1
    model = served
    if served == "wide":
        model = str(tmp_path)
        command = [sys.executable, str(TOOLS / "random_model.py"), model, "--layers", "2"]
        subprocess.run(command, check=True, timeout=200)
    command = [sys.executable, str(TOOLS / "deterministic.py"), model]
    command += ["--ranks", "1,2" if several else "1", "--rounds", "0", "--output-len", "32"]
    command += ["--changes", "2", "--kills", "1", "--limit", "500"]
    if served == "tiny":
        command += ["--input-len", "100", "--set", "model.dtype=float32"]
    assert subprocess.run(command, timeout=550).returncode == 0


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cuda")
