"""Benchmarks that need an NVIDIA GPU: a MoE layer and a decode step against their rooflines."""
