"""The MoE layers of a rank on an NVIDIA GPU, and the memory of its experts."""
