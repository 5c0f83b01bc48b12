"""The GPU backend: Triton kernels over windows that ranks of one host share by CUDA IPC.

cuda_layout           where everything lies in a window, and in the table that kernels read (pure)
wait_kernels, dispatch_kernels, combine_kernels
                      what runs on the GPU
kernel_launch         launches that share what the first of their kind found out (launches.c)
cuda_exchange         their launches and tensors; can be captured into CUDA graphs
expert_major          the rows copied together by expert; can be captured, too
driver_state          whether this process has opened CUDA's driver
cuda_runtime          calls of the CUDA runtime that torch does not offer
ipc_memory            device memory that other processes can map
device_memory         the same for comm/peer_memory.py: memory that peers read
peers                 the windows of the peers, and their addresses
cuda_received         what a dispatch brought
cuda_buffer           the contract of comm/buffer.py over all that
"""

from __future__ import annotations

import importlib.util

import torch

from flexpert.comm.errors import CommError
from flexpert.comm.interpreter import INTERPRETED


def require(*, measuring: bool = False) -> None:
    """measuring: Triton's interpreter is not enough.

    Raises: CommError: this machine cannot use the backend; says what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise CommError("backend 'cuda' needs Triton: pip install 'flexpert[cuda]'")
    if (measuring or not INTERPRETED) and not torch.cuda.is_available():
        raise CommError("backend 'cuda' needs a GPU, and a torch that is built with CUDA")
