"""Compiles the three C parts of the package; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/flexpert/comm/host/build_kernels.py:ffibuilder",
        "src/flexpert/comm/cuda/build_launches.py:ffibuilder",
        "src/flexpert/kernels/cpu/build_ops.py:ffibuilder",
    ]
)
