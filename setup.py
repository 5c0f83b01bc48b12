"""Compiles the two C files of the package; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=[
        "src/flexpert/comm/host/build_kernels.py:ffibuilder",
        "src/flexpert/kernels/cpu/build_ops.py:ffibuilder",
    ]
)
