"""Makes the buffer of a backend: the one module of the exchange that knows them all."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, cast

from flexpert.comm.buffer import Buffer, BufferSpec, Channel, OnTimeout

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from flexpert.comm.bounded import StoreKeys


class BufferOptions(TypedDict, total=False):
    """The options of `make_buffer`, for those who hand them on."""

    backend: str
    timeout_s: float
    on_timeout: OnTimeout
    store: StoreKeys | None
    channel: Channel
    machine: str | None
    two_level: bool
    slots: int | None
    choices: int | None


def make_buffer(
    rank: int,
    spec: BufferSpec,
    *,
    backend: str = "host",
    timeout_s: float = 30.0,
    on_timeout: OnTimeout = "raise",
    store: StoreKeys | None = None,
    channel: Channel = "auto",
    machine: str | None = None,
    two_level: bool = True,
    slots: int | None = None,
    choices: int | None = None,
) -> Buffer:
    """A new buffer.

    Args:
        rank: the own id.
        spec: sizes.
        backend: "host": CPU tensors. "cuda": tensors on the current CUDA device. "nixl_ep":
            the same with NVIDIA's kernels, all ranks on one host. In Triton's interpreter
            (TRITON_INTERPRET=1) the device is the CPU, and nixl_ep is `flexpert.compat.nixl_ep`.
        timeout_s: limit of every wait that is not given another.
        on_timeout: what becomes of a peer that does not answer in time, or dies: "raise" ends the
            exchange and the epoch with RankTimeout or RankLost; "mask" masks the peer and goes on
            without it, see `Buffer.missing_results`.
        store: a torch.distributed Store for `connect` by ids; but for "nixl_ep" also what else has
            the calls of `StoreKeys`.
        channel: "auto": shared memory where two ranks are on one machine, else NIXL; or one of
            them for all peers. With "cuda", "shm" saves two small launches an exchange.
        machine: ranks with equal names use shared memory; default: the boot id of the kernel.
        two_level: with "host", send a token once to each other machine, to one of the ranks there
            that need it, and get its results in one sum (reduce="rank"). In epochs of
            `set_active`, between ranks that were all made with it, with channel="auto",
            on_timeout="raise" and a topk of 2 or more; otherwise each rank is sent its rows
            itself. It changes no result but by rounding, and none with reduce="home".
        slots: most local experts of any rank, the same on all; only "nixl_ep" must know.
        choices: only for "cuda", the same on all ranks: a combine with "home" takes tokens of at
            most so many choices; the memory for results grows with them, so 1 is right for who
            only combines with "rank". Default: `spec.topk`.

    Raises:
        ValueError: unknown backend, rank outside [0, capacity), or a spec out of range.
        CommError: backend "cuda" without Triton or without a GPU, "nixl_ep" without the package or
            without a GPU it can use.
    """
    if (slots is not None) != (backend == "nixl_ep"):
        raise ValueError("slots is for backend 'nixl_ep', which needs it; for no other")
    if choices is not None and backend != "cuda":
        raise ValueError("choices is for backend 'cuda'; for no other")
    if channel == "nixl" and backend == "nixl_ep":
        raise ValueError("backend 'nixl_ep' reaches ranks of one host only; channel='auto'")
    if backend == "cuda":
        from flexpert.comm.cuda import require

        require()
        from flexpert.comm.cuda.cuda_buffer import CudaBuffer

        return CudaBuffer(
            rank,
            spec,
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            store=store,
            channel=channel,
            machine=machine,
            choices=choices,
        )
    if backend == "nixl_ep":
        from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer

        assert slots is not None  # checked above
        of_torch = cast("Store | None", store)  # NVIDIA's kernels take no other
        return NixlEpBuffer(
            rank, spec, slots=slots, timeout_s=timeout_s, on_timeout=on_timeout, store=of_torch
        )
    if backend != "host":
        raise ValueError(f"unknown exchange backend {backend!r}: host, cuda or nixl_ep")
    from flexpert.comm.host.host_buffer import HostBuffer

    return HostBuffer(
        rank,
        spec,
        timeout_s=timeout_s,
        on_timeout=on_timeout,
        store=store,
        channel=channel,
        machine=machine,
        two_level=two_level,
    )
