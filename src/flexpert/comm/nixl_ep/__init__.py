"""NVIDIA's nixl_ep kernels behind the contract of comm/buffer.py.

`flexpert.compat.nixl_ep` is the opposite, our buffer behind NVIDIA's interface. No module here
imports it; only `package.find` loads it, by its name, to stand in for NVIDIA's package in Triton's
interpreter.

package               where the module is, which version, and what its kernels take
expert_numbers        from our expert tables to nixl_ep's numbers (pure)
meeting               where two ranks find each other without a TCPStore
shared_store          keys and values in memory that two processes have open
nixl_ep_received      what a dispatch brought: from nixl_ep's tensors to rows
nixl_ep_buffer        the contract over all that
"""
