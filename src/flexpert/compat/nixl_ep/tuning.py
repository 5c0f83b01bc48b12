"""nixl_ep.Config: how its high-throughput kernels are tuned; here so that it can be imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Config:
    """Numbers for kernels that a CPU does not have; kept, and used by nothing.

    num_sms: multiprocessors. The others: tokens a chunk, over NVLink and RDMA.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256
