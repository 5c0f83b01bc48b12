"""Compile exchange, experts' products, layers of decode steps, attention, indexers, and sampling for Hopper
without a GPU, and print what ptxas says.

    python tools/gpu/compile_kernels.py [--ptx DIRECTORY] [--deterministic]

Needs Triton, and a ptxas (the one that Triton brings). Exit status 1 if a kernel spills registers,
needs more shared memory than a program of Hopper has, or takes arguments that prepared launches
(comm/cuda/kernel_launch.py) would not give it.
"""

# ruff: noqa: C408, E501

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flexpert.comm.cuda import combine_kernels as combine
from flexpert.comm.cuda import dispatch_kernels as dispatch
from flexpert.comm.cuda import expert_major, lane_kernels
from flexpert.comm.cuda import wait_kernels as waiting
from flexpert.comm.cuda.cuda_exchange import Tuning
from flexpert.comm.cuda.cuda_layout import combine_format, dispatch_format
from flexpert.comm.cuda.kernel_launch import argument_sizes, parameter_sizes
from flexpert.kernels.cuda import absorbed_attention as absorbed
from flexpert.kernels.cuda import (
    delta_rule,
    drafts,
    few_tokens,
    fixed_attention,
    fixed_products,
    hopper_attention,
    index_scores,
    mxfp4_few,
    prompt_attention,
    sampling,
    some_tokens,
    state_space,
    states,
)
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat

TUNED = Tuning()
PREPARED = (dispatch, combine, expert_major, lane_kernels, waiting, products, sampling)
MODULES = (
    *PREPARED, absorbed, drafts, fixed_products, fixed_attention, mxfp4_few, hopper_attention,
    prompt_attention, delta_rule, state_space, states, index_scores, few_tokens, some_tokens,
)  # fmt: skip
MOST_SHARED = 227 * 1024  # bytes
P64, P32, F32, BF16, I32, I64 = "*i64", "*i32", "*fp32", "*bf16", "i32", "i64"
SHAPE = dict(R=8, TOPK=8, MAX_TOKENS=512)
WHERE = dict(WEIGHTS_AT=1 << 16, SCALES_AT=1 << 17, ROWS_AT=1 << 18, RESULTS_AT=1 << 24)
SEND = dict(
    x=BF16, expert_ids=P64, weights=F32, owner=P32, slot=P32, table=P64, counters=P32, window=I64,
    tokens=I32, me=I32, experts=I32,
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any], int]] = {
    f"send_dispatch {name}": (
        "send_dispatch",
        SEND | ({} if kind else {"x": P32}),
        SHAPE | dict(K=8, LANES_R=8, LANES_K=8, KIND=kind, WORDS=7168 if kind else 3584,
                     TILE=TUNED.send_width, FORMAT=dispatch_format(8, 7168, None), WAIT=True, CHECKS=True, SIM=False) | WHERE,
        TUNED.send_warps,
    )
    for name, kind in (("fp8", 1), ("rows", 0))
} | {
    "index_rows": (
        "index_rows",
        dict(window=I64, table=P64, offsets=P32, rows=P32, pairs=P32, position=P32, slots=I32),
        SHAPE | dict(LANES_R=8, CHUNK=TUNED.chunk),
        TUNED.index_warps,
    ),
    **{
        f"pack_rows {name}": (
            "pack_rows",
            dict(window=I64, table=P64, position=P32, offsets=P32, rows=P32, x=P32, scales=P32,
                 count=P32, token=P32, ranges=P64, places=P32, slots=I32, limit=I32, sources=I32),
            SHAPE | dict(LANES_R=8, LANES_K=8, STRIDE=words, WORDS=words, WIDTH=TUNED.pack_width,
                         SCALE_STRIDE=scales, SCALES=scales, LANES_S=64, CHUNK=128, BLANKS=1024) | WHERE,
            TUNED.pack_warps,
        )
        for name, words, scales in (("fp8", 1792, 56), ("ue8m0", 1792, 14), ("rows", 3584, 0))
    },
    **{
        f"send_combine {name}": (
            "send_combine",
            dict(out=BF16, y=BF16, position=P32, expert_ids=P64, owner=P32, table=P64,
                 counters=P32, window=I64, tokens=I32, me=I32, experts=I32),
            SHAPE | dict(K=8, LANES_K=8, H=7168, WIDTH=TUNED.width, HOME=home, SHARED=given, SOURCE=4096 if given else 512, FORMAT=combine_format(8, home=home), WAIT=True, CHECKS=True, SIM=False) | WHERE,
            TUNED.combine_warps,
        )
        for name, home, given in (
            ("rank", False, False), ("home", True, False), ("given", False, True), ("split", True, True)
        )
    },
    **{
        f"reduce {name}": (
            "reduce",
            dict(out=BF16, y=BF16, position=P32, expert_ids=P64, weights=F32, owner=P32, table=P64,
                 window=I64, tokens=I32, me=I32, experts=I32),
            SHAPE | dict(K=8, LANES_K=8, H=7168, WIDTH=TUNED.width, HOME=home, SHARED=given, SOURCE=4096 if given else 512) | WHERE,
            TUNED.combine_warps,
        )
        for name, home, given in (
            ("rank", False, False), ("home", True, False), ("given", False, True), ("split", True, True)
        )
    },
    "share_weights": (
        "share_weights",
        dict(weights=F32, expert_ids=P32, table=P64, window=I64, tokens=I32, me=I32),
        SHAPE | dict(K=8, CHUNK=2048, SEND=True, WAIT=True, CHECKS=True, SIM=False) | WHERE,
        8,
    ),
    **{
        f"take_dispatch {name}": (
            "take_dispatch",
            dict(table=P64, window=I64),
            dict(R=8, TOPK=8, LANES_K=8, MAX_TOKENS=512, WORDS=words, BYTES=False,
                 TILE=min(TUNED.take_width, 2048), SCALES=scales, SCALES_TILE=64,
                 WEIGHTS_AT=1 << 16, SCALES_AT=1 << 17, ROWS_AT=1 << 18),
            TUNED.take_warps,
        )
        for name, words, scales in (("fp8", 1792, 56), ("rows", 3584, 0))
    },
    "take_weights": (
        "take_weights",
        dict(table=P64, window=I64),
        dict(R=8, TOPK=8, MAX_TOKENS=512, WEIGHTS_AT=1 << 16, CHUNK=1024),
        4,
    ),
    **{
        f"take_combine {name}": (
            "take_combine",
            dict(expert_ids=P64, owner=P32, table=P64, window=I64, tokens=I32, experts=I32),
            dict(R=8, K=8, TOPK=8, LANES_K=8, MAX_TOKENS=512, WORDS=3584, TILE=TUNED.take_width,
                 RESULTS_AT=1 << 24, HOME=home, SHARED=given, SOURCE=4096 if given else 512),
            TUNED.take_warps,
        )
        for name, home, given in (("rank", False, False), ("home", True, False), ("shared", False, True))
    },
    **{
        f"choose_tokens {name}": (
            "_choose_tokens",
            dict(words=words, settings="*fp64", tokens=P64, possible=F32, vocab=I32, stride=I32, rows=I32),
            dict(HALF=name == "bf16", BLOCK=8192),
            16,
        )
        for name, words in (("bf16", "*i16"), ("float32", "*i32"))
    },
    "place_rows": (
        "_place_rows",
        dict(sources=P64, left=P64, accepted=P64, token_ids=P64, positions=P64, context_len=P32,
             slot_mapping=P64, tables=P32, rows=I32, columns=I32, stride=I32),
        dict(WIDTH=4, BLOCK=16, ROWS=64),
        4,
    ),
    "judge_rows": (
        "_judge_rows",
        dict(questions=P64, sampled=P64, token_ids=P64, positions=P64, left=P64, accepted=P64,
             last=P64, at=P64, asked=P64, sequences=I32),
        dict(WIDTH=4, ROWS=64),
        4,
    ),
    "tokens_after": (
        "_tokens_after",
        dict(sources=P64, token_ids=P64, sampled=P64, result=P64, count=I32),
        dict(ROWS=64),
        4,
    ),
    "further_rows": (
        "_further_rows",
        dict(step=P64, asked=P64, at=P64, tables=P32, positions=P64, context_len=P32,
             slot_mapping=P64, sequences=I32, columns=I32, stride=I32),
        dict(BLOCK=16, ROWS=64),
        4,
    ),
    "release": ("release", dict(table=P64, bits=I32, me=I32), {}, 1),
    "await_release": ("await_release", dict(table=P64, window=I64), dict(SIM=False), 1),
    "meet": (
        "meet", dict(table=P64, window=I64, me=I32), dict(SEND=True, WAIT=True, SIM=False), 1
    ),
}  # fmt: skip


ROWS_EACH = {"few rows": 4, "some rows": 32, "more rows": 64, "many rows": 256}


def product(
    gated: bool, packed: WeightFormat | None, each: int, *, fixed: bool = False
) -> tuple[dict[str, str], dict[str, Any], int, int]:
    """(types, constants, warps, stages) of an experts' product with about `each` rows an expert.
    fixed: of those for --deterministic."""
    slots = 128
    if fixed:
        tiling = products.choose_fixed(each * slots, slots, gated=gated)
    else:
        tiling = products.choose(each * slots, slots, gated=gated, packed=packed)
    types = dict(
        x=BF16,
        index=P32,
        weights=P64,
        offsets=P32,
        out=BF16,
        slots=I32,
        K=I32,
        N=I32,
        first_programs=I32,
    )
    if packed is not None:
        types["scales"] = P64
    constants = dict(
        biases=None, EVEN=True, SLOTS=slots, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth,
        GATED=gated, INDEXED=True, FORMAT=packed.name if packed else None, PACKED=True, BIASED=False, SWAP=tiling.swap, PRECISION="tf32",
        FOLLOWS=True,
    )  # fmt: skip
    if packed is None:
        constants["scales"] = None
    return types, constants, tiling.warps, tiling.stages


LATENTS = ((128, 512, 64), (16, 512, 64), (32, 256, 64))  # heads, rank, rope


def attention_to_latents(
    shape: tuple[int, int, int], decode: bool, split: bool, block: int = 16
) -> tuple[dict[str, str], dict[str, Any], int, int]:
    """(types, constants, warps, stages) of attention with queries absorbed."""
    heads, rank, rope = shape
    tiling = absorbed.choose(heads, rank, decode=decode, dtype=torch.bfloat16)
    types = dict(
        query=BF16, rotary=BF16, cache=BF16, query_start=P32, context_len=P32, block_tables=P32, out=BF16,
        partial=F32, peaks=F32, sums=F32, first=I32, sequences=I32, max_blocks=I32, tokens=I32, splits=I32,
        scaling="fp32", softcap="fp32", query_head=I32, query_token=I32, rotary_head=I32, rotary_token=I32,
    )  # fmt: skip
    constants = dict(
        sinks=None, SEQUENCES=1 if decode else 64, BLOCK=block, HEADS=heads, RANK=rank, RANK_PAD=absorbed.padded(rank),
        ROPE=rope, ROPE_PAD=absorbed.padded(rope), ROWS=tiling.heads, KEYS=tiling.keys, SPLIT=split, DECODE=decode,
        WINDOW=0, CAPPED=False, SINKS=False, PRECISION="tf32",
    )  # fmt: skip
    return types, constants, tiling.warps, tiling.stages


def of_an_indexer(decode: bool) -> dict[str, tuple[Any, ...]]:
    """What DeepSeek-V3.2's indexer asks of its keys."""
    tiling = index_scores.choose(torch.bfloat16)
    where = dict(query_start=P32, context_len=P32, block_tables=P32)
    sizes = dict(first=I32, sequences=I32, max_blocks=I32)
    how = dict(SEQUENCES=1 if decode else 64, BLOCK=16, DECODE=decode)
    name = "" if decode else " mixed"
    return {
        f"index scores{name}": (
            "_score_keys",
            dict(query=F32, weights=F32, keys=BF16, scores=F32, length=I32, query_token=I32,
                 query_head=I32, weights_token=I32) | where | sizes,
            dict(HEADS=64, HEADS_PAD=64, DIM=128, DIM_PAD=128, KEYS=tiling.keys, TILES=tiling.tiles, PRECISION="tf32") | how,
            tiling.warps,
            tiling.stages,
        ),
        f"picked places{name}": (
            "_place_keys",
            dict(picked=P64, places=P32, counts=P32, most=I32) | where | sizes,
            dict(LANES=512) | how,
            4,
        ),
    }  # fmt: skip


def some(rows: int) -> dict[str, tuple[Any, ...]]:
    """A layer of Qwen3-30B-A3B's sizes with so many rows."""
    tiling = some_tokens.SomeTiling()
    common = dict(FOLLOWS=True, PRECISION="tf32")
    wide = dict(COLUMNS=tiling.columns, ROWS=rows, DEPTH=tiling.depth)
    types = dict(
        x=BF16, weight=BF16, out=BF16, sums=F32, arrived=P32, rows=I32, N=I32, K=I32, part=I32
    )
    rotated = dict.fromkeys(
        ("qkv", "cos", "sin", "query_norm", "key_norm", "key_cache", "value_cache", "out"), BF16
    )
    parts = dict(partial=F32, peaks=F32, sums=F32, arrived=P32)
    sizes = dict(max_blocks=I32, splits=I32, scaling="fp32", eps="fp32")
    return {
        f"some {rows}: linear": (
            "_project_some", types | dict(residual=BF16),
            common | wide | dict(bias=None, PARTS=3, BIASED=False, ADDED=True), tiling.warps,
            tiling.stages,
        ),
        f"some {rows}: route": (
            "_route_some",
            dict(x=BF16, norm=BF16, weight=BF16, normed=BF16, sums=F32, weights=BF16, ids=P64, arrived=P32, rows=I32, eps="fp32"),
            common | dict(bias=None, K=2048, EXPERTS=128, EXPERTS_PAD=128, PARTS=8, PART=256, ROWS=16, CHUNK=1024,
                          TOPK=8, TOPK_PAD=8, EARLY=True, BIASED=False, NORMALISED=True), 8,
        ),
        f"some {rows}: attention": (
            "_attend_few",
            rotated | parts | sizes | dict(slot_mapping=P64, context_len=P32, block_tables=P32),
            common | dict(sinks=None, BLOCK=16, KV_HEADS=4, GROUP=8, DIM=128, DIM_PAD=128, ROWS=16, KEYS=64, SPLITS=2,
                          ANGLES=128, NORMED=True, EARLY=True, WINDOW=0, SINKS=False), 4,
        ),
    }  # fmt: skip


def few_rows(gated: bool) -> tuple[dict[str, str], dict[str, Any], int]:
    """(types, constants, warps) of MXFP4's product for a few rows."""
    tiling = mxfp4_few.FewRowsTiling(2, 1 if gated else 2)
    types = dict(
        x=BF16, index=P32, weights=P64, scales=P64, biases=P64, offsets=P32, out=BF16, slots=I32, K=I32, N=I32
    )  # fmt: skip
    double = gated or tiling.tiles == 2
    constants = dict(SLOTS=128, GATED=gated, DOUBLE=double, INDEXED=True, BIASED=True)
    return types, constants, tiling.warps


def attention_of_prompts(
    dim: int, split: bool, by_hand: bool, window: int = 0
) -> tuple[str, dict[str, str], dict[str, Any], int, int]:
    """(kernel, types, constants, warps, stages), 8 heads for each of keys."""
    tiling = prompt_attention.choose(dim, dtype=torch.bfloat16, by_hand=by_hand)
    types = dict(
        query=BF16, key_cache=BF16, value_cache=BF16, query_start=P32, context_len=P32, block_tables=P32,
        out=BF16, partial=F32, peaks=F32, sums=F32, sequences=I32, max_blocks=I32, tokens=I32, splits=I32,
        scaling="fp32", softcap="fp32", query_token=I32, query_head=I32,
    )  # fmt: skip
    constants = dict(
        sinks=None, SEQUENCES=64, BLOCK=16, KV_HEADS=4, GROUP=8, TOKENS=tiling.rows // 8, ROWS=tiling.rows,
        KEYS=tiling.keys, SPLIT=split, WINDOW=window, CAPPED=False, SINKS=False,
    )  # fmt: skip
    if by_hand:
        constants |= dict(
            DIM=dim,
            **hopper_attention.layouts(tiling.keys, 16, dim, tiling.warps),
        )
        return "attend_prompts_hopper", types, constants, tiling.warps, tiling.stages
    constants |= dict(KEY=dim, KEY_PAD=dim, VALUE=dim, VALUE_PAD=dim, PRECISION="tf32")
    return "_attend_prompts", types, constants, tiling.warps, tiling.stages


def fixed_linear(rows: int, columns: int) -> tuple[str, dict[str, str], dict[str, Any], int, int]:
    """A linear layer for --deterministic: (kernel, types, constants, warps, stages)."""
    tiling = fixed_products.choose(rows, columns, 4, torch.bfloat16)
    types = dict(
        x=BF16, weight=BF16, out=BF16, sums=F32, arrived=P32, rows=I32, N=I32, K=I32, part=I32, parts=I32
    )  # fmt: skip
    constants = dict(
        bias=None, EVEN=True, COLUMNS=tiling.columns, ROWS=tiling.rows, DEPTH=tiling.depth,
        PARTED=4 if tiling.parted else 0, BIASED=False, PRECISION="tf32",
    )  # fmt: skip
    return "_linear", types, constants, tiling.warps, tiling.stages


def fixed_attend(
    dim: int, *, decode: bool, split: bool
) -> tuple[str, dict[str, str], dict[str, Any], int, int]:
    """Attention for --deterministic, 8 heads for each of keys: as `fixed_linear`."""
    tiling = fixed_attention.choose(dim, dim, torch.bfloat16)
    types = dict(
        query=BF16, key_cache=BF16, value_cache=BF16, query_start=P32, context_len=P32, block_tables=P32,
        out=BF16, partial=F32, peaks=F32, sums=F32, sequences=I32, max_blocks=I32, tokens=I32, splits=I32,
        scaling="fp32", softcap="fp32", query_token=I32, query_head=I32,
    )  # fmt: skip
    constants = dict(
        sinks=None, SEQUENCES=1 if decode else 64, BLOCK=16, KV_HEADS=4, GROUP=8, KEY=dim, KEY_PAD=dim,
        VALUE=dim, VALUE_PAD=dim, TOKENS=1 if decode else tiling.rows // 8, ROWS=tiling.rows,
        KEYS=tiling.keys, KEYS_IN_CHUNK=fixed_attention.CHUNK, SPLIT=split, DECODE=decode, WINDOW=0,
        CAPPED=False, SINKS=False, PRECISION="tf32",
    )  # fmt: skip
    return "_attend", types, constants, tiling.warps, tiling.stages


def fixed_cases() -> dict[str, tuple[Any, ...]]:
    """Those of --deterministic: what differs between two of a kind must change no bits."""
    cases: dict[str, tuple[Any, ...]] = {}
    for gated, packed in itertools.product((True, False), (None, FP8, MXFP4)):
        for rows, each in ROWS_EACH.items():
            kind = (
                f"fixed {'gate_up' if gated else 'down'} {packed.name if packed else 'bf16'} {rows}"
            )
            cases[kind] = ("_product", *product(gated, packed, each, fixed=True))
    for rows in (16, 32, 64, 128, 2048):
        for columns in (2048, 151936):
            cases[f"fixed linear {rows} x {columns}"] = fixed_linear(rows, columns)
    for dim in (64, 128, 256):
        for name, decode, split in (
            ("one", True, False),
            ("cut", True, True),
            ("prompt", False, False),
        ):
            cases[f"fixed attention {dim} {name}"] = fixed_attend(dim, decode=decode, split=split)
    return cases


def states_in_place() -> dict[str, tuple[Any, ...]]:
    """A token through a layer with a state: of Qwen3-Next and Granite-4."""
    kept = dict(states=F32, sources=P64, targets=P64)
    taps = dict(convolution=BF16, convolved=BF16, sources=P64, targets=P64)
    gates = dict(rate=BF16, shift=BF16, out=BF16)
    heads = dict.fromkeys(("query", "key", "value"), BF16) | dict.fromkeys(HEAD_STRIDES, I32)
    steps = dict.fromkeys(("beta_row", "beta_group", "decay_row", "decay_group"), I32)
    cases: dict[str, tuple[Any, ...]] = {
        "convolved heads": (
            "_mixed_heads",
            taps
            | heads
            | steps
            | dict(mixed=F32, gates=F32, beta=BF16, decay=BF16, rate=BF16, shift=BF16),
            dict(
                begins=None,
                bias=None,
                HEADS=16,
                EACH=2,
                KEY=128,
                VALUE=128,
                LANES=128,
                WIDTH=4,
                TAPS=4,
            ),
            1,
        ),
        "delta rule": (
            "_delta_rule",
            kept | dict(mixed=F32, gates=F32, out=BF16),
            dict(starts=None, HEADS=16, EACH=2, KEY=128, VALUE=128, KEYS=128, COLUMNS=32),
            4,
        ),
        "delta rule of prompts": (
            "_delta_rule",
            kept | dict(mixed=F32, gates=F32, out=BF16, starts=P64),
            dict(HEADS=16, EACH=2, KEY=128, VALUE=128, KEYS=128, COLUMNS=8),
            1,
        ),
        "convolved channels": (
            "_mixed_channels",
            taps | dict(projected=BF16, bias=BF16, mixed=BF16, stride=I32, begins=P64),
            dict(INNER=8192, CHANNELS=8448, LANES=128, WIDTH=4, TAPS=4),
            1,
        ),
        "state space": (
            "_state_space",
            kept | gates | dict(projected=BF16, mixed=BF16, skip=BF16),
            dict(
                starts=None,
                HEADS=128,
                EACH=128,
                DIM=64,
                SIZE=128,
                SOME=32,
                SIZES=128,
                CHANNELS=8448,
            ),
            4,
        ),
        "state space of prompts": (
            "_state_space",
            kept | gates | dict(projected=BF16, mixed=BF16, skip=BF16, starts=P64),
            dict(HEADS=128, EACH=128, DIM=64, SIZE=128, SOME=8, SIZES=128, CHANNELS=8448),
            1,
        ),
    }
    cases["norm before a gate"] = (
        "_normed_before_gate",
        dict(y=BF16, gate=BF16, weight=BF16, eps="fp32") | dict.fromkeys(GATE_STRIDES, I32),
        dict(HEADS=32, EACH=2, VALUE=128, VALUES=128, TOGETHER=8),
        4,
    )
    cases["gated norm"] = (
        "_gated_norm",
        dict(y=BF16, projected=BF16, weight=BF16, stride=I32, eps="fp32"),
        dict(INNER=8192, NORMED=8192, COLUMNS=8192),
        8,
    )
    cases["take states"] = (
        "_take_states",
        dict(states=F32, slots=P64, taken=F32, size=I32),
        dict(BLOCK=2048),
        4,
    )
    cases["put states"] = (
        "_put_states",
        dict(new=F32, states=F32, slots=P64, size=I32),
        dict(BLOCK=2048),
        4,
    )
    return cases


HEAD_STRIDES = (
    "query_row", "query_head", "key_row", "key_head", "value_row", "value_group", "value_head",
)  # fmt: skip
GATE_STRIDES = "gate_row", "gate_group", "gate_head"
STRIDES = (
    *HEAD_STRIDES,
    *GATE_STRIDES,
    "size",
    "stride",
    "query_head",
    "query_token",
    "rotary_head",
    "rotary_token",
    "weights_token",
)


def compiled(
    function: str, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int = 3
) -> tuple[str, int]:
    """(PTX for sm_90, bytes of shared memory), pointers aligned as the allocator aligns them."""
    kernel = next(getattr(m, function) for m in MODULES if hasattr(m, function))
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(n),): v for n, v in constants.items() if n in names}
    unaligned = kernel.do_not_specialize_on_alignment or ()
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if (signature[name].startswith("*") and name not in unaligned)
        or (name in ("window", "K", "N", "part", *STRIDES) and signature[name] != "constexpr")
    }
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, values, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    made: Any = triton.compile(source, GPUTarget("cuda", 90, 32), options)
    ptx = str(made.asm["ptx"])
    prepared = any(hasattr(module, function) for module in PREPARED)
    if prepared and parameter_sizes(ptx) != argument_sizes(names, signature):
        raise SystemExit(f"{function} takes other arguments than kernel_launch.py gives it")
    return ptx, int(made.metadata.shared)


def resources(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as ptxas counts them."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = "-arch=sm_90a" if "sm_90a" in ptx else "-arch=sm_90"
        for name in ("ptxas", "ptxas-blackwell"):  # Triton 3.9 writes PTX for the newer one
            ran = subprocess.run(
                [folder / name, "-v", arch, file.name, "-o", "/dev/null"],
                capture_output=True,
                text=True,
            )
            if ran.returncode == 0:
                break
    if ran.returncode:
        raise SystemExit(f"ptxas refuses the kernel: {ran.stderr}")
    said = ran.stderr
    numbers = [re.search(p, said) for p in (r"Used (\d+) reg", r"(\d+) bytes spill st")]
    registers, spilled = (int(n.group(1)) if n else 0 for n in numbers)
    return registers, spilled


def usual_cases() -> dict[str, tuple[Any, ...]]:
    """All others."""
    cases: dict[str, tuple[Any, ...]] = dict(CASES)
    for gated, packed in itertools.product((True, False), (None, FP8, MXFP4)):
        for rows, each in ROWS_EACH.items():
            kind = f"{'gate_up' if gated else 'down'} {packed.name if packed else 'bf16'} {rows}"
            cases[kind] = ("_product", *product(gated, packed, each))
    cases["store_latents"] = (
        "_store_latents",
        dict(latents=BF16, cache=BF16, slot_mapping=P64, token_stride=I32),
        dict(SIZE=576, SIZE_PAD=1024),
        4,
    )
    for shape, decode, split in itertools.product(LATENTS, (True, False), (True, False)):
        kind = f"mla {shape[0]}/{shape[1]}{'' if decode else ' mixed'}{' split' if split else ''}"
        cases[kind] = ("_attend_latents", *attention_to_latents(shape, decode, split))
    for split in (True, False):
        kind = f"mla picked{' split' if split else ''}"
        cases[kind] = ("_attend_latents", *attention_to_latents(LATENTS[0], True, split, block=1))
    cases |= of_an_indexer(decode=True) | of_an_indexer(decode=False)
    for dim, split, by_hand in itertools.product((64, 128), (False, True), (False, True)):
        kind = f"prompts {dim}{' split' if split else ''}{' Hopper' if by_hand else ''}"
        cases[kind] = attention_of_prompts(dim, split, by_hand)
        if dim == 128 and not split:
            cases[f"{kind} chunks"] = attention_of_prompts(dim, split, by_hand, window=-8192)
    cases |= states_in_place() | some(64)
    for gated in (False, True):
        cases[f"few rows {'gated' if gated else 'down'}"] = ("_few_rows", *few_rows(gated))
    return cases


def by_cores(ptx: str) -> str:
    """Which instructions of the tensor cores a kernel has."""
    found = sorted(set(re.findall(r"wgmma\.mma_async[^ ]*(m\d+)n|(mma\.sync[^ ]*m\d+n)", ptx)))
    names = [f"wgmma {wide}" if wide else old for wide, old in found]
    return f", {', '.join(names)}" if names else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ptx", type=Path, help="keep the PTX here")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the kernels of that mode instead, which may spill",
    )
    options = parser.parse_args()
    worst = 0
    cases = fixed_cases() if options.deterministic else usual_cases()
    for name, (function, types, constants, warps, *stages) in cases.items():
        ptx, shared = compiled(function, types, constants, warps, *stages)
        registers, spilled = resources(ptx)
        wide = len(re.findall(r"(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", ptx))
        print(
            f"{name:22} {warps} warps, {registers:3} registers, {spilled} bytes spilled, "
            f"{shared} bytes shared, {wide} accesses of 16 bytes{by_cores(ptx)}"
        )
        worst = max(worst, 0 if options.deterministic else spilled, shared - MOST_SHARED)
        if options.ptx is not None:
            options.ptx.mkdir(parents=True, exist_ok=True)
            (options.ptx / f"{name.replace(' ', '_')}.ptx").write_text(ptx)
    return 1 if worst > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
