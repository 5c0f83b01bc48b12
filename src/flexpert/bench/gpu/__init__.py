"""Benchmarks that need an NVIDIA GPU: a MoE layer and a whole decode step, beside their limits."""
