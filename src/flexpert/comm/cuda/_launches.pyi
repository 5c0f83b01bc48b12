"""What cffi builds from launches.c; its functions are declared there."""

from typing import Any

ffi: Any
lib: Any
