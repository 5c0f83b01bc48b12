"""What a model computes with: C kernels on a CPU, Triton kernels on a GPU."""
