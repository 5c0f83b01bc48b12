"""What a kind of device means for the settings: its defaults, and which combinations are refused.

Pure, and without torch: `flexpert.engine.device_profile` is the device itself, once it is opened.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

MOST_GPU_RANKS: Final = 32
"""Ranks between which flexpert's kernels for GPUs exchange."""

NIXL_EP_RANKS: Final = (*range(1, 9), 16, 24, 32)
"""Numbers of ranks for which NVIDIA's kernels are compiled."""

Quantization = Literal["auto", "none", "fp8", "mxfp4", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class SettingCombination:
    """Those settings that not every device takes; see `flexpert.config` for each."""

    quantization: Quantization
    all2all: Literal["auto", "nixl_ep"]
    deterministic: bool
    speculates: bool
    max_ranks: int
    on_missing_expert: Literal["load", "degrade"]


class DeviceSettings(ABC):
    """The rules of one kind of device.

    Attributes:
        uses_host_memory: weights, KV cache and windows of a rank are in memory of the host.
        process_bytes: an estimate of what the process of a rank takes of the host's memory besides.
    """

    uses_host_memory: bool
    process_bytes: int

    @abstractmethod
    def engine_defaults(self, all2all: object, *, alone: bool) -> dict[str, int]:
        """Defaults of `EngineConfig` that differ from the class's.

        all2all: as it is given, not yet validated. alone: there is never more than one rank.
        """

    @abstractmethod
    def cluster_defaults(self) -> dict[str, int]:
        """Defaults of `ClusterConfig` where no number of ranks is given."""

    @abstractmethod
    def quantization(self, desired: Quantization) -> Quantization:
        """How experts are quantized in memory, where `desired` is set."""

    @abstractmethod
    def refusal(self, settings: SettingCombination) -> str | None:
        """Why the device does not take a combination, and what to do; None: it does."""


class CpuSettings(DeviceSettings):
    """A CPU exchanges over shared memory, and can order sums."""

    uses_host_memory = True
    process_bytes = 64 * 2**20

    def engine_defaults(self, all2all: object, *, alone: bool) -> dict[str, int]:
        return {}

    def cluster_defaults(self) -> dict[str, int]:
        return {}

    def quantization(self, desired: Quantization) -> Quantization:
        return "none" if desired == "auto" else desired

    def refusal(self, settings: SettingCombination) -> str | None:
        if settings.quantization == "fp8":
            return (
                "--quantization fp8 needs --device cuda: leave it out, and an fp8 checkpoint is "
                "dequantized at load; int4, int8 and mxfp4 are what a CPU computes with"
            )
        if settings.all2all != "auto":
            return (
                f"--all2all {settings.all2all} needs --device cuda: its kernels run on "
                "GPUs; leave it out, and ranks exchange over shared memory"
            )
        return None


class CudaSettings(DeviceSettings):
    """A GPU has larger steps and caches, and one rank by default, which exchanges nothing."""

    uses_host_memory = False
    process_bytes = 832 * 2**20  # of a rank with 15 GB on a GPU

    def engine_defaults(self, all2all: object, *, alone: bool) -> dict[str, int]:
        defaults = {"max_running": 256, "kv_memory": 4 * 2**30}
        if all2all != "nixl_ep":  # whose memory grows with tokens times experts, ours with ranks
            # with fewer than some 3,000, launching a step takes longer than computing it
            defaults["max_tokens_per_step"] = 8192 if alone else 2048
        return defaults

    def cluster_defaults(self) -> dict[str, int]:
        return {"max_ranks": 1}

    def quantization(self, desired: Quantization) -> Quantization:
        return desired

    def refusal(self, settings: SettingCombination) -> str | None:
        ranks = settings.max_ranks
        if settings.quantization in {"int8", "int4"}:
            other = {"int8": "fp8", "int4": "mxfp4"}[settings.quantization]
            return (
                f"--quantization {settings.quantization} needs --device cpu: fp8 and mxfp4 are "
                f"what a GPU computes with, and {other} takes as much memory"
            )
        if settings.all2all == "nixl_ep" and ranks not in NIXL_EP_RANKS:
            return (
                f"max_ranks ({ranks}) is none that --all2all nixl_ep takes: "
                f"{', '.join(map(str, NIXL_EP_RANKS))}; change --max-ranks"
            )
        if ranks > MOST_GPU_RANKS:
            return (
                f"max_ranks ({ranks}) is more than {MOST_GPU_RANKS}, the most "
                "that exchange between GPUs; lower --max-ranks"
            )
        if ranks > 1 and settings.on_missing_expert == "degrade":
            return (
                "on_missing_expert=degrade needs --device cpu: on a GPU the weights of the experts "
                "that are left are not normalised anew; leave --on-missing-expert out"
            )
        if settings.speculates and settings.all2all == "nixl_ep":
            return (
                "--speculate does not go with --all2all nixl_ep, of whose steps each is waited for "
                "before its tokens are sampled; leave either out"
            )
        if settings.deterministic and settings.all2all == "nixl_ep":
            return (
                "--deterministic does not go with --all2all nixl_ep, which adds results up in an "
                "order that depends on the number of ranks; leave --all2all out"
            )
        return None


DEVICE_SETTINGS: Final[Mapping[str, DeviceSettings]] = {
    "cpu": CpuSettings(),
    "cuda": CudaSettings(),
}
"""By the setting `engine.device`."""
