"""What cffi builds from kernels.c; its functions are declared there."""

from typing import Any

ffi: Any
lib: Any
