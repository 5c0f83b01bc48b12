"""NVIDIA's nixl_ep kernels behind the contract of comm/buffer.py.

package       where the module is, which version, and what its kernels take
routes        from our expert tables to nixl_ep's numbers, and from its tensors to rows (pure)
meeting       where two ranks find each other without a TCPStore
shared_store  keys and values in memory that two processes have open
received      what a dispatch brought
buffer        the contract over all that
"""
