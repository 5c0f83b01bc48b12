"""Compiles the three C parts of the package; everything else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    cffi_modules=[
        "src/flexpert/comm/host/build_kernels.py:ffibuilder",
        "src/flexpert/kernels/cpu/build_ops.py:ffibuilder",
    ],
    ext_modules=[
        Extension(
            "flexpert.comm.cuda._launches",
            ["src/flexpert/comm/cuda/launches.c"],
            py_limited_api=True,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
        )
    ],
)
