"""The computation of a rank on an NVIDIA GPU, in Triton: experts, paged attention, norms.

Nothing here waits for the host: sizes that change from step to step are read from device memory,
so that a captured CUDA graph serves any batch of its bucket and any placement of the experts.
Importing needs the package `triton`; without a GPU the kernels run in its interpreter.
"""

from flexpert.comm.interpreter import mend

mend()
