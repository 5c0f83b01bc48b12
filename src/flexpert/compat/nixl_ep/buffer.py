"""nixl_ep.buffer: NVIDIA's `Buffer` for tensors on a CPU or a GPU, over `flexpert.comm.Buffer`.

Names, arguments, shapes and the polarity of masks are those of nixl_ep 1.5.1; docs/nixl_ep.md lists
what differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch

from flexpert.comm.buffer import Buffer as Core
from flexpert.comm.buffer import BufferSpec
from flexpert.comm.cuda import require
from flexpert.comm.errors import CommError
from flexpert.comm.factory import make_buffer
from flexpert.compat.nixl_ep.call_checks import (
    check_bound,
    check_one_way,
    check_tensor,
    check_waits,
    check_x,
    scales,
)
from flexpert.compat.nixl_ep.cpu_exchange import CpuDevice
from flexpert.compat.nixl_ep.current_store import CurrentStore
from flexpert.compat.nixl_ep.device_exchange import (
    Device,
    DeviceDispatched,
    DispatchSizes,
    Handle,
    desired,
    on_gpu,
)
from flexpert.compat.nixl_ep.lifetime import Lifetime
from flexpert.compat.nixl_ep.paired_exchange import PairedExchange, Receive
from flexpert.compat.nixl_ep.sizes import size_hint, spec_from_bytes
from flexpert.compat.nixl_ep.tuning import Config
from flexpert.compat.nixl_ep.utils import EventHandle, EventOverlap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

__all__ = ["DEFAULT_TIMEOUT_MS", "Buffer", "Config", "EventHandle", "EventOverlap"]

DEFAULT_TIMEOUT_MS = 30_000
CONNECT_LIMIT_S = 300.0  # peers may still be loading a model
_MOST_KINDS = 4096

RecvX = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Buffer:
    """One rank's end of dispatch and combine, as nixl_ep offers it.

    Calls come from one thread, but `connect_ranks(…, activate=False)`, which may come from another.

    Attributes:
        rank: the own id.
        group_size: capacity in ranks; 0 before `update_memory_buffers`.
        runtime: the `flexpert.comm.Buffer` underneath; None before `update_memory_buffers` and
            after `destroy`.
    """

    num_sms = 20

    def __init__(
        self,
        disable_ll_nvlink: bool = False,
        explicitly_destroy: bool = False,
        rank: int = 0,
        low_latency_mode: bool = True,
        group: ProcessGroup | None = None,
        comm: Any = None,
        tcp_store_group: Store | None = None,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
    ) -> None:
        """
        Args:
            disable_ll_nvlink: no meaning here.
            explicitly_destroy: resources are kept until `destroy`; else, until this object goes.
            rank: the own id.
            low_latency_mode: must be True.
            group, comm: kept, and used by nothing.
            tcp_store_group: where ranks meet to connect.
            timeout_ms: a rank that keeps an exchange waiting longer is masked.

        Raises:
            TypeError: disable_ll_nvlink is no bool: most likely it was meant to be the rank.
            ValueError: high-throughput mode, a negative rank, or a limit that is not positive.
        """
        if not isinstance(disable_ll_nvlink, bool):
            raise TypeError(
                f"disable_ll_nvlink is {disable_ll_nvlink!r}: the first argument is not the rank; "
                "write Buffer(rank=…)"
            )
        if not low_latency_mode:
            raise ValueError("only low_latency_mode=True is offered: there are no other kernels")
        if rank < 0 or timeout_ms <= 0:
            raise ValueError(
                f"rank ({rank}) must not be negative, timeout_ms ({timeout_ms}) must be positive"
            )
        self.rank = rank
        self.group_size = 0
        self.num_rdma_bytes = self.num_nvl_bytes = 0
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.group = group
        self.comm = comm
        self.timeout_ms = timeout_ms
        self.runtime: Core | None = None
        self._store = CurrentStore(tcp_store_group)
        self._experts = 0
        self._exchange: PairedExchange[Any] | None = None
        self._raw: dict[bool, torch.Tensor] = {}
        self._lifetime: Lifetime | None = None
        self._fitting: set[tuple[object, ...]] = set()  # kinds of arguments that were checked
        self._usual: dict[tuple[object, ...], DispatchSizes] = {}  # of dispatches that were made
        self._destroyed = False

    # ---- sizes ------------------------------------------------------------------------------

    @staticmethod
    def get_low_latency_buffer_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """The number of bytes for `update_memory_buffers`, which finds the sizes of tokens by it.

        Raises: ValueError: sizes that no buffer can have; hidden must be a multiple of 16.
        """
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, must be at least 1")
        return size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks)

    @staticmethod
    def get_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """`get_low_latency_buffer_size_hint` by its other name."""
        return Buffer.get_low_latency_buffer_size_hint(
            num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
        )

    def update_memory_buffers(
        self,
        num_ranks: int,
        num_experts_per_rank: int,
        num_rdma_bytes: int,
        num_nvl_bytes: int = 0,
    ) -> None:
        """Take memory for up to `num_ranks` ranks; a second call may only raise their number.

        It is taken on the current GPU, if torch sees one, and on the CPU otherwise; with
        FLEXPERT_NIXL_EP_DEVICE in the environment, on what that says: "cpu" or "cuda".

        Args:
            num_ranks: capacity, 1 to 256; on a GPU 1 to 32, for good.
            num_experts_per_rank: local experts of every rank.
            num_rdma_bytes: what `get_rdma_size_hint` returned in this process, or more.
            num_nvl_bytes: size of what `get_local_buffer_tensor` shows.

        Raises:
            ValueError: less than any hint, or a second call with other sizes.
            CommError: no Triton for the GPU.
        """
        self._check_alive()
        if num_experts_per_rank < 1:
            raise ValueError(f"num_experts_per_rank is {num_experts_per_rank}, must be at least 1")
        spec = spec_from_bytes(num_rdma_bytes, num_ranks)
        if self.runtime is None:
            device = self._device(spec)
            core = self.runtime = device.core
            self._lifetime = Lifetime(core)
            self._exchange = PairedExchange(core, device, num_experts_per_rank, self._lifetime)
            self._experts = num_experts_per_rank
            if not self.explicitly_destroy:
                weakref.finalize(self, self._lifetime.end)
        else:
            now = self.runtime.spec
            if (spec.max_tokens, spec.hidden) != (now.max_tokens, now.hidden) or (
                num_experts_per_rank != self._experts
            ):
                raise ValueError(
                    f"the buffer is for {now.max_tokens} tokens of {now.hidden} channels and "
                    f"{self._experts} experts a rank; it can only be given more ranks"
                )
            self.runtime.grow(num_ranks)
            self._fitting.clear()
            self._usual.clear()
        self.group_size = num_ranks
        self.num_rdma_bytes = num_rdma_bytes
        self.num_nvl_bytes = num_nvl_bytes

    # ---- membership -------------------------------------------------------------------------

    @property
    def tcp_store_group(self) -> Store | None:
        """Where ranks meet to connect."""
        return self._store.store

    def set_tcp_store_group(self, tcp_store_group: Store | None) -> None:
        """Meet at another store from now on."""
        self._store.store = tcp_store_group

    def connect_ranks(self, remote_ranks: Iterable[int], activate: bool = True) -> None:
        """Connect to ranks that call this too; the own id and connected ones are skipped.

        activate: exchange with them from the next dispatch on, as they must; else they stay masked
            until `update_mask_buffer`, and this may run while dispatch and combine do.

        Raises:
            RankTimeout: they did not come in five minutes; those that did are connected.
            ValueError: an id beyond the capacity, or no store.
        """
        self._core().connect(
            [int(rank) for rank in remote_ranks], activate=activate, timeout_s=CONNECT_LIMIT_S
        )

    def disconnect_ranks(self, remote_ranks: Iterable[int]) -> None:
        """Leave ranks, any and in any order; unknown ids are ignored."""
        self._core().disconnect([int(rank) for rank in remote_ranks])

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Exchange with a connected rank from the next dispatch on, or with `mask`, no
        longer.

        Raises: ValueError: masking the own rank, unmasking one that is not connected, or an id
            beyond the capacity.
        """
        core = self._core()
        if not 0 <= rank_to_mask < core.spec.capacity:
            raise ValueError(f"rank {rank_to_mask} is outside of the capacity {core.spec.capacity}")
        core.check()  # on a GPU, replays of graphs may have left it out
        if mask:
            core.mask([rank_to_mask])
        else:
            core.unmask([rank_to_mask])

    def query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 0 for each rank that takes part in exchanges, 1 for all others.

        mask_status: [capacity] int32.
        """
        core = self._core()
        core.check()  # on a GPU, replays of graphs may have left ranks out
        if mask_status.dtype is not torch.int32 or mask_status.shape != (core.spec.capacity,):
            raise ValueError(
                f"mask_status must be [{core.spec.capacity}] int32, is "
                f"{list(mask_status.shape)} {mask_status.dtype}"
            )
        mask_status.fill_(1)
        mask_status[list(core.active)] = 0

    def clean_mask_buffer(self) -> None:
        """Exchange with all connected ranks from the next dispatch on."""
        core = self._core()
        core.check()
        core.unmask(core.connected)

    def barrier(self) -> None:
        """Wait for all unmasked ranks; those that do not come in time are masked."""
        self._exchanges().barrier(self.timeout_ms / 1000)

    def destroy(self) -> None:
        """Release everything; may be called again, and from a signal handler."""
        self._destroyed = True
        self.runtime = self._exchange = None
        self._raw.clear()
        if self._lifetime is not None:
            self._lifetime.end()

    # ---- the exchange -----------------------------------------------------------------------

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[RecvX, torch.Tensor, Handle, EventOverlap, Callable[[], None] | None]:
        """Send each token to the ranks that own its experts; receive those for the own experts.

        Args:
            x: [tokens, hidden] bfloat16; tokens may be 0.
            topk_idx: [tokens, k] int32 or int64, k at most 32, -1 = none. Expert e belongs to rank
                e // experts_per_rank; experts of masked and unconnected ranks are skipped.
            num_max_dispatch_tokens_per_rank: T, equal on all ranks.
            num_experts: experts_per_rank times the number of ranks in the result, R; default: up
                to the highest unmasked id.
            cumulative_local_expert_recv_stats: [experts_per_rank] int32; what was received
                is added.
            dispatch_wait_recv_cost_stats: [R] int64; nanoseconds until each rank's rows were there
                are added.
            use_fp8: quantise to e4m3 with a scale for 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: four scales to an int32; needs round_scale.
            async_finish: receive when the event is waited for.
            return_recv_hook: receive when the hook is called. Not both.

        Returns:
            recv_x: [experts_per_rank, R * T, hidden] bfloat16; with fp8 a pair: that in
                float8_e4m3fn and [experts_per_rank, R * T, hidden / 128] float32, or
                [experts_per_rank, R * T, hidden / 512] int32, column-major in the last two
                dimensions. Valid until the dispatch after the next.
            recv_count: [experts_per_rank] int32; only so many rows of each expert count. They are
                in the order of source rank, then token.
            handle: for `combine`: src_info [experts_per_rank, R * T] int32, the token's index at
                its home; layout_range [experts_per_rank, R] int64, begin << 32 | count of the
                rows of each rank; T; hidden.
            event, hook: see above; the hook is None without return_recv_hook.

        Raises: ValueError: shapes, dtypes or sizes; nothing was sent.
        """
        usual = not (
            async_finish
            or return_recv_hook
            or cumulative_local_expert_recv_stats is not None
            or dispatch_wait_recv_cost_stats is not None
        )
        of = (num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0)
        if usual:
            direct = self._dispatched_directly(x, topk_idx, of)
            if direct is not None:
                return direct
        core, exchange = self._core(), self._exchanges()
        check_one_way(async_finish, return_recv_hook)
        tokens, ranks = num_max_dispatch_tokens_per_rank, self._ranks(core, num_experts)
        fp8 = scales(use_fp8, round_scale, use_ue8m0)
        at = exchange.device.at
        kind = (
            x.dtype, x.shape, x.device, topk_idx.shape, topk_idx.device, tokens, fp8,
        )  # fmt: skip
        if kind not in self._fitting:
            check_x(x, topk_idx, tokens, fp8, core.spec, at)
            self._fits(kind)
        if cumulative_local_expert_recv_stats is not None:
            check_tensor(
                "cumulative_local_expert_recv_stats",
                cumulative_local_expert_recv_stats,
                (self._experts,),
                torch.int32,
                at,
            )
        check_waits("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, ranks, at)
        done, receive = exchange.dispatch(
            x,
            topk_idx,
            tokens,
            ranks,
            fp8,
            later=async_finish or return_recv_hook,
            recv_stats=cumulative_local_expert_recv_stats,
            wait_stats=dispatch_wait_recv_cost_stats,
        )
        if usual and done.rows.hidden == core.spec.hidden:
            if len(self._usual) >= _MOST_KINDS:
                self._usual.clear()
            self._usual[of] = done.rows
        event, hook = _ends(receive, async_finish)
        return _recv_x(done), done.returned.recv_count, done.handle, event, hook

    def _dispatched_directly(
        self, x: torch.Tensor, topk_idx: torch.Tensor, of: tuple[object, ...]
    ) -> tuple[RecvX, torch.Tensor, Handle, EventOverlap, None] | None:
        """What a dispatch like one before returns; None: it is not, or something is not as usual.

        of: maximum of tokens, num_experts, and how rows are quantised.
        """
        rows, exchange, core = self._usual.get(of), self._exchange, self.runtime
        if rows is None or exchange is None or core is None:
            return None
        if of[1] is None or rows.ranks < core.spec.capacity:  # else there is room for any rank
            least = core.active[-1] + 1
            if least != rows.ranks and (of[1] is None or least > rows.ranks):
                return None
        done = exchange.dispatch_directly(x, topk_idx, rows)
        if done is None:
            return None
        return _recv_x(done), done.returned.recv_count, done.handle, EventOverlap(), None

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Return results to the tokens' homes: out[t] = Σ_k weight[t, k] · row of (t, k), summed
        in float32. Experts of masked ranks are left out; the weights are not renormalised.

        Args:
            x: [experts_per_rank, R * T, hidden] bfloat16, in the places of recv_x.
            topk_idx: [tokens, k] as in dispatch; entries may have become -1, and count no longer.
            topk_weights: [tokens, k] float32.
            handle: of one of the last two dispatches; may be combined more than once.
            use_logfmt: permits a lossy format on the wire; rows travel as bfloat16 all the same.
            zero_copy: the rows are in `get_next_combine_buffer(handle)`, not in x.
            async_finish, return_recv_hook: as in dispatch.
            out: [tokens, hidden] bfloat16 to fill.
            combine_wait_recv_cost_stats: [R] int64, as in dispatch.

        Returns: the sums [tokens, hidden] bfloat16, event, hook.

        Raises:
            ValueError: shapes, dtypes, or (on a CPU) other experts than in dispatch; or a rank
                was unmasked since that the handle has no room for. Nothing was sent.
            StaleEpoch: the handle is too old.
        """
        direct = self._exchange
        if direct is not None and not (
            async_finish
            or return_recv_hook
            or zero_copy
            or combine_wait_recv_cost_stats is not None
        ):
            result = direct.combine_directly(x, topk_idx, topk_weights, handle, out)
            if result is not None:
                return result, EventOverlap(), None
        core, exchange = self._core(), self._exchanges()
        check_one_way(async_finish, return_recv_hook)
        done = exchange.find(handle)
        rows = done.rows
        check_bound(rows.ranks, core.active)
        if zero_copy:
            if exchange.staged is None or exchange.staged.shape != rows.shape:
                raise ValueError("zero_copy needs get_next_combine_buffer(handle), filled, before")
            x = exchange.staged
        at = exchange.device.at
        shape = done.experts.shape
        size = (shape[0], rows.hidden)
        if out is None:
            out = torch.empty(size, dtype=torch.bfloat16, device=at)
        kind = (
            x.dtype, x.shape, x.device, rows, shape, topk_weights.dtype, topk_weights.shape,
            topk_weights.device, out.dtype, out.shape, out.device,
        )  # fmt: skip
        if kind not in self._fitting:
            check_tensor("x", x, rows.shape, torch.bfloat16, at)
            check_tensor("topk_weights", topk_weights, tuple(shape), torch.float32, at)
            check_tensor("out", out, size, torch.bfloat16, at)
            self._fits(kind)
        check_waits("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, rows.ranks, at)
        receive = exchange.combine(
            x,
            topk_idx,
            topk_weights,
            done,
            out=out,
            later=async_finish or return_recv_hook,
            wait_stats=combine_wait_recv_cost_stats,
        )
        return out, *_ends(receive, async_finish)

    dispatch = low_latency_dispatch
    combine = low_latency_combine

    def get_next_combine_buffer(self, handle: Handle) -> torch.Tensor:
        """[experts_per_rank, R * T, hidden] bfloat16 to fill for `combine(…, zero_copy=True)`."""
        exchange = self._exchanges()
        return exchange.stage(exchange.find(handle))

    # ---- what is tied to GPUs ---------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether new buffers are on a GPU of that kind or a later one."""
        return on_gpu() and torch.cuda.get_device_capability() >= (9, 0)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Kept in `Buffer.num_sms`. Raises: ValueError: an odd number."""
        if new_num_sms % 2:
            raise ValueError(f"the number of multiprocessors must be even, is {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """The event of all work so far on the current stream; on a CPU it is done."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cpu.Stream | torch.cuda.Stream:
        """The stream of the exchanges: the current one, the only one of a CPU."""
        return torch.cuda.current_stream() if on_gpu() else torch.cpu.current_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Memory of this rank for the caller's own use: num_nvl_bytes, or num_rdma_bytes of it.

        Peers do not write here, as opposed to nixl_ep; pages are taken when they are written to.

        size: shape of the view; default: all of it, flat. offset: elements to skip.
        """
        at = self._exchanges().device.at
        available = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        raw = self._raw.get(use_rdma_buffer)
        if raw is None or raw.numel() < available:
            raw = self._raw[use_rdma_buffer] = torch.empty(available, dtype=torch.uint8, device=at)
        flat = raw[: available // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]
        if size is None:
            return flat
        if flat.numel() < size.numel():
            raise ValueError(
                f"{list(size)} {dtype} at {offset} is more than the {available} bytes there are"
            )
        return flat[: size.numel()].view(size)

    # ---- helpers ----------------------------------------------------------------------------

    def _device(self, spec: BufferSpec) -> Device[Any]:
        timeout_s, store = self.timeout_ms / 1000, cast("Store", self._store)
        if desired() == "cpu":
            return CpuDevice(
                make_buffer(self.rank, spec, timeout_s=timeout_s, on_timeout="mask", store=store)
            )
        require()
        from flexpert.compat.nixl_ep.gpu_exchange import GpuDevice  # needs Triton

        return GpuDevice.of(self.rank, spec, timeout_s, store)

    def _fits(self, kind: tuple[object, ...]) -> None:
        """Remember that arguments of this kind need not be looked at in every call."""
        if len(self._fitting) >= _MOST_KINDS:
            self._fitting.clear()
        self._fitting.add(kind)

    def _check_alive(self) -> None:
        if self._destroyed:
            raise CommError(f"the buffer of rank {self.rank} is destroyed")

    def _core(self) -> Core:
        self._check_alive()
        if self.runtime is None:
            raise CommError(f"rank {self.rank}: call update_memory_buffers first")
        return self.runtime

    def _exchanges(self) -> PairedExchange[Any]:
        self._core()
        return cast("PairedExchange[Any]", self._exchange)

    def _ranks(self, core: Core, num_experts: int | None) -> int:
        """How many ranks the tensors of a dispatch are for."""
        least = core.active[-1] + 1
        if num_experts is None:
            return least
        ranks, rest = divmod(num_experts, self._experts)
        if rest or not least <= ranks <= core.spec.capacity:
            raise ValueError(
                f"num_experts is {num_experts}: with {self._experts} experts a rank it must be a "
                f"multiple of that, for at least the {least} ranks up to the highest unmasked id "
                f"and at most the {core.spec.capacity} of update_memory_buffers"
            )
        return ranks


def _recv_x(done: DeviceDispatched[Any]) -> RecvX:
    returned = done.returned
    return returned.recv_x if returned.scales is None else (returned.recv_x, returned.scales)


def _ends(
    receive: Receive | None, async_finish: bool
) -> tuple[EventOverlap, Callable[[], None] | None]:
    """receive: what is still to be done, in one of two ways."""
    return (EventOverlap(receive), None) if async_finish else (EventOverlap(None), receive)
