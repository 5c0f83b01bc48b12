"""What `flexpert bench layer` found."""

from __future__ import annotations

import msgspec

from flexpert.bench.gpu.gpu_device import MeasuredGpu
from flexpert.bench.gpu.layer_weights import LayerShape
from flexpert.bench.machine import Machine
from flexpert.bench.statistics import SpreadUs

OURS = "flexpert"
EXCHANGED = "flexpert, exchanged"
BASELINE_FAMILIES = ("grouped_mm", "eager")
"""transformers' own: torch's grouped product, and a loop over the experts that waits for the GPU
to tell it which ones."""

INPUTS = 4  # different batches in one graph, so that the L2 does not keep one's experts


class LayerResult(msgspec.Struct, frozen=True, kw_only=True):
    """One baseline at one number of tokens.

    error: relative to float64. times_ours: of the medians. skipped: why there are no figures;
    wrong: it computed something else.
    """

    baseline: str
    us: SpreadUs | None = None
    error: float | None = None
    times_ours: float | None = None
    skipped: str | None = None
    wrong: bool = False


class LayerPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One number of tokens.

    tokens: of each rank. active: experts of one GPU that get a token, mean. roofline_us: bytes or
    flops over what a GPU can. quantised: flexpert's experts are fp8, and the roofline is theirs;
    the baselines have bf16. gpus: that the ranks are dealt out to.
    """

    shape: LayerShape
    tokens: int
    active: float
    roofline_us: float
    results: list[LayerResult]
    quantised: bool = False
    ranks: int = 1
    gpus: int = 1


class LayerReport(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: MeasuredGpu
    points: list[LayerPoint]

    @property
    def correct(self) -> bool:
        return not any(result.wrong for point in self.points for result in point.results)
