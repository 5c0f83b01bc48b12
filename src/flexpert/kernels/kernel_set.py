"""The kernels of a device under one contract: C on a CPU (`ops`), Triton on a GPU (`cuda`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from flexpert.errors import ConfigError
from flexpert.kernels.cpu import ops
from flexpert.kernels.state_steps import (
    DeltaInputs,
    DeltaWeights,
    StateRows,
    StateSpaceWeights,
)

AVX512_ROWS: Final = 4
"""Up to so many rows our product is faster than torch's without AMX: on one core of an AMD EPYC
(Zen 4) it reads a weight of 4096 x 2880 for one row at 17 GB/s, torch at 9; for 4 rows at 9.3 and
8.7, for 8 at 3 and 8."""
AVX512_BYTES: Final = 2**20
"""Weights that a cache holds are left to torch, by which a row has the same bits in any number."""
BF16_ROWS: Final = 128
"""As AVX512_ROWS, where there are products of bf16, for weights of any size: of 1024 x 1024 on one
core of an AMD EPYC (Zen 5) 16 rows take us 101 us, torch 207; 128 rows 632 and 685; 512 rows 2.6
and 2.4 ms; of 256 x 4096 128 rows take 724 and 697 us."""


class PagedAttentionKernel(Protocol):
    """See `ops.paged_attention`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        *,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class NormKernel(Protocol):
    """See `ops.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, *, early: bool) -> Tensor: ...


class LinearKernel(Protocol):
    """See `ops.linear`."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class AttendKernel(Protocol):
    """See `cuda.attention.attend`."""

    def __call__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        *,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class RotateKernel(Protocol):
    """See `cuda.rotary.rotate_and_store`."""

    def __call__(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        early: bool,
    ) -> Tensor: ...


class ChooseKernel(Protocol):
    """See `cuda.router.choose_experts`."""

    def __call__(
        self, logits: Tensor, topk: int, *, normalised: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...


class StoreLatentsKernel(Protocol):
    """See `cuda.absorbed_attention.store_latents`."""

    def __call__(self, latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None: ...


class AttendLatentsKernel(Protocol):
    """See `cuda.absorbed_attention.attend_latents`."""

    def __call__(
        self,
        query: Tensor,
        rotary: Tensor,
        cache: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        *,
        first: int = 0,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        decode: bool,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LatentKernels:
    """Attention to a cache of latents, absorbed and (`attend`) expanded."""

    store: StoreLatentsKernel
    attend_latents: AttendLatentsKernel
    attend: AttendKernel


class ScoreKeysKernel(Protocol):
    """See `cuda.index_scores.score_keys`."""

    def __call__(
        self,
        query: Tensor,
        weights: Tensor,
        keys: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        *,
        first: int = 0,
        decode: bool,
    ) -> Tensor: ...


class PlaceKeysKernel(Protocol):
    """See `cuda.index_scores.place_keys`."""

    def __call__(
        self,
        picked: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        places: Tensor,
        counts: Tensor,
        *,
        first: int = 0,
        block_size: int,
        decode: bool,
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class IndexKernels:
    """What an indexer does with the keys that it keeps in pages. store: one key of each token."""

    store: StoreLatentsKernel
    score: ScoreKeysKernel
    place: PlaceKeysKernel


class TakeStatesKernel(Protocol):
    """See `cuda.states.take_states`."""

    def __call__(self, states: Tensor, slots: Tensor) -> Tensor: ...


class PutStatesKernel(Protocol):
    """See `cuda.states.put_states`."""

    def __call__(self, new: Tensor, states: Tensor, slots: Tensor) -> None: ...


class DeltaRuleKernel(Protocol):
    """See `cuda.delta_rule.gated_delta_rule`."""

    def __call__(
        self,
        inputs: DeltaInputs,
        weights: DeltaWeights,
        convolved: Tensor,
        states: Tensor,
        rows: StateRows,
    ) -> Tensor: ...


class StateSpaceKernel(Protocol):
    """See `cuda.state_space.state_space`."""

    def __call__(
        self,
        projected: Tensor,
        weights: StateSpaceWeights,
        convolved: Tensor,
        states: Tensor,
        rows: StateRows,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StateKernels:
    """What layers that keep a state of each sequence do with theirs: in a decode step take them out
    and put them back, or in any step compute where they are."""

    take: TakeStatesKernel
    put: PutStatesKernel
    delta_rule: DeltaRuleKernel
    state_space: StateSpaceKernel


class FewTokenKernels(Protocol):
    """See `cuda.few_tokens.FewTokens`."""

    @property
    def most_depth(self) -> int: ...

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float, bool] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor: ...

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        early: bool,
        scaling: float,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor: ...

    def route(
        self,
        x: Tensor,
        norm: tuple[Tensor, float, bool],
        weight: Tensor,
        bias: Tensor | None,
        topk: int,
        *,
        normalised: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Fusions:
    """What takes the place of whole modules where launches cost more than their work.

    few: of whole layers, in steps of `few_tokens` tokens at most; some: in those of more, but
    `some_tokens` at most. None: nothing.
    """

    attend: AttendKernel
    rotate_and_store: RotateKernel
    choose_experts: ChooseKernel
    few: FewTokenKernels | None = None
    few_tokens: int = 0
    some: FewTokenKernels | None = None
    some_tokens: int = 0


class RowKernel(Protocol):
    """See `cuda.fixed_rows`: [..., n] → [...] or [..., n], along the last dimension."""

    def __call__(self, x: Tensor) -> Tensor: ...


class LayerNormKernel(Protocol):
    """See `cuda.fixed_rows.layer_norm_rows`."""

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FixedOrderKernels:
    """What `--deterministic` computes on a GPU in place of torch's libraries."""

    linear: LinearKernel
    sum_rows: RowKernel
    mean_rows: RowKernel
    softmax_rows: RowKernel
    layer_norm_rows: LayerNormKernel


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model's dense part calls.

    wide_norms: the norm takes a float32 weight for rows of any dtype.
    linear: for bfloat16, where it is faster than torch's for the fewest rows; None: it is not.
    linear_rows: up to so many; None: for any number, but for what several threads share.
    linear_bytes: weights of at least so many.
    pads_batches: batches are padded to few sizes, because torch compiles a product for each.
    recorded_rows: up to so many rows a step is faster as a recorded program (`RecordedSteps`) than
        by transformers' modules; 0: there are none for the device.
    latents: None: `paged_attention` takes a cache whose values are part of its keys.
    indexers: of a GPU, where rows need not have the same bits in any company; None: transformers'
        modules compute each sequence apart.
    states: None: torch takes them and puts them back.
    fixed_order: of a GPU, where a row is to have the same bits in any company; None: it need not,
        or it is a CPU.
    """

    paged_attention: PagedAttentionKernel
    rms_norm: NormKernel
    linear: LinearKernel | None = None
    linear_rows: int | None = None
    linear_bytes: int = 0
    fusions: Fusions | None = None
    pads_batches: bool = False
    wide_norms: bool = False
    recorded_rows: int = 0
    latents: LatentKernels | None = None
    indexers: IndexKernels | None = None
    states: StateKernels | None = None
    fixed_order: FixedOrderKernels | None = None


def cpu_kernels() -> Kernels:
    """Those in C."""
    here = ops.instruction_set()
    linear = ops.linear if here.startswith(("amx", "avx")) else None
    most, least, recorded = {
        "amx": (None, 0, 512),
        "avx512_bf16": (BF16_ROWS, 0, 512),
        "avx512": (AVX512_ROWS, AVX512_BYTES, 8),
        "avx2": (None, 0, 512),
    }.get(here, (None, 0, 4))
    return Kernels(
        ops.paged_attention,
        ops.rms_norm,
        linear,
        most,
        least,
        pads_batches=True,
        recorded_rows=recorded,
    )


def gpu_kernels(device: torch.device) -> Kernels:
    """Those in Triton; on tensors of a CPU they need its interpreter.

    device: of all tensors; what they need of its memory is taken now.
    """
    from flexpert.kernels.cuda import (
        absorbed_attention,
        attention,
        delta_rule,
        few_tokens,
        index_scores,
        norm,
        rotary,
        router,
        some_tokens,
        state_space,
        states,
    )

    return Kernels(
        attention.paged_attention,
        norm.rms_norm,
        fusions=Fusions(
            attention.attend,
            rotary.rotate_and_store,
            router.choose_experts,
            few=few_tokens.FewTokens(device),
            few_tokens=few_tokens.MOST_TOKENS,
            some=some_tokens.SomeTokens(device),
            some_tokens=some_tokens.MOST_TOKENS,
        ),
        latents=LatentKernels(
            absorbed_attention.store_latents, absorbed_attention.attend_latents, attention.attend
        ),
        indexers=IndexKernels(
            absorbed_attention.store_latents, index_scores.score_keys, index_scores.place_keys
        ),
        wide_norms=True,
        states=StateKernels(
            states.take_states,
            states.put_states,
            delta_rule.gated_delta_rule,
            state_space.state_space,
        ),
    )


def fixed_order_gpu_kernels(device: torch.device) -> Kernels:
    """As `gpu_kernels`, and a row has the same bits in any company.

    device: of all tensors; what they need of its memory is taken now.
    """
    from flexpert.kernels.cuda import fixed_attention, fixed_rows, norm, rotary, router
    from flexpert.kernels.cuda.fixed_products import FixedProducts

    choose = functools.partial(router.choose_experts, deterministic=True)
    return Kernels(
        fixed_attention.paged_attention,
        norm.rms_norm,
        fusions=Fusions(fixed_attention.attend, rotary.rotate_and_store, choose),
        wide_norms=True,
        fixed_order=FixedOrderKernels(
            FixedProducts(device).linear,
            fixed_rows.sum_rows,
            fixed_rows.mean_rows,
            fixed_rows.softmax_rows,
            fixed_rows.layer_norm_rows,
        ),
    )


def open_gpu() -> torch.device:
    """The GPU that this process uses. Raises: ConfigError: what `check_gpu` raises."""
    check_gpu()
    return torch.device("cuda", torch.cuda.current_device())


def check_gpu() -> None:
    """Whether there is a GPU that torch can use, without opening it.

    Raises:
        ConfigError: torch sees none, or triton is missing; says what to do.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise ConfigError(
            "no NVIDIA GPU that torch can use: "
            + (
                f"torch {torch.__version__} was built for CUDA {built}; is the driver installed, "
                "and is CUDA_VISIBLE_DEVICES right?"
                if built
                else f"torch {torch.__version__} is a build for CPUs; install one for CUDA"
            )
        )
    _need_triton()


def _need_triton() -> None:
    try:
        import triton  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise ConfigError(
            f"computing on a GPU needs the package triton ({error}): pip install flexpert[cuda]"
        ) from error
