"""Memory of a device, as ranks on other machines read it: by way of the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flexpert.kernels.device_stream import DeviceStream


@dataclass(frozen=True, slots=True)
class DeviceRegion:
    """[size] uint8 of the device of `stream`."""

    memory: Tensor
    stream: DeviceStream

    @property
    def size(self) -> int:
        return self.memory.numel()

    def read(self, offset: int, into: Tensor) -> None:
        """Fill [n] uint8 of the host, and wait for it."""
        with self.stream.aside():
            into.copy_(self.memory[offset : offset + into.numel()])
