"""Kernels in C for CPUs; see ops.c."""
