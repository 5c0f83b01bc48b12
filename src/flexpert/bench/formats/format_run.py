"""Decode steps of a model with its experts in several formats, in turn, and their memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor

from flexpert.bench.formats.format_model import BLOCK, DenseModel, FormatModel, gpt_oss_20b
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.errors import FlexpertError
from flexpert.kernels.cpu import ops
from flexpert.models.batch import ForwardBatch

WARM_UP = 3
EXACT_ERROR = 0.03
"""‖logits − bf16's‖ / ‖…‖ of a format that holds the drawn weights: other kernels round
otherwise."""
ROUNDED_ERROR = 0.3
"""The same where weights are rounded once more."""
JUDGED_LAYERS = 2
"""With more, differences of rounding have random routers choose other experts, layer upon layer."""


class FormatPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One format. expert_bytes: of all experts; all_bytes: with the dense part. processor_us: time
    of all threads in a step, which others on the machine do not lengthen as they do step_us.
    error: of the logits of a step, relative to those of the first format."""

    format: str
    expert_bytes: int
    all_bytes: int
    step_us: SpreadUs
    processor_us: SpreadUs
    error: float

    def is_correct(self, layers: int) -> bool:
        """Of a model of so many layers; True where that cannot be judged."""
        limit = EXACT_ERROR if self.format in ("none", "mxfp4") else ROUNDED_ERROR
        return layers > JUDGED_LAYERS or self.error < limit


class FormatReport(msgspec.Struct, frozen=True, kw_only=True):
    """points: by format, the first one is what the others are compared with."""

    machine: Machine
    device: str
    layers: int
    vocabulary: int
    batch: int
    context: int
    steps: int
    threads: int
    points: list[FormatPoint]

    @property
    def correct(self) -> bool:
        return all(point.is_correct(self.layers) for point in self.points)


def run_formats(
    formats: Sequence[str],
    device: torch.device,
    *,
    layers: int,
    batch: int,
    context: int,
    steps: int,
    seed: int,
    note: Callable[[str], None],
) -> FormatReport:
    """Build the model in each format, compare, then time steps of all in turn.

    Args:
        formats: none or of `FORMATS`, that the device computes with; the first is the baseline.
        batch: sequences; context: tokens of each before the first step.

    Raises: FlexpertError: there is too little memory.
    """
    torch.manual_seed(seed)
    if device.type == "cpu":
        ops.set_threads(torch.get_num_threads())
    longest = context + WARM_UP + steps + 1
    with contextlib.ExitStack() as closing, torch.inference_mode():
        try:
            note("drawing the dense part")
            dense = DenseModel.draw(gpt_oss_20b(layers), device, seed)
            models = []
            for name in formats:
                note(f"experts in {name}")
                models.append(FormatModel(dense, name, batch, longest, closing))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as full:
            if "memory" not in str(full):
                raise
            raise FlexpertError(
                f"the memory does not hold all formats at once ({str(full).splitlines()[0]}); give "
                "fewer --layers or --formats"
            ) from full
        note("steps")
        tokens = torch.randint(0, dense.info.vocab, (batch,))
        for model in models:
            note(f"{model.name}: {model.runner.steps}")
        first = [_step(model, tokens, context)[2].float().cpu() for model in models]
        times: dict[str, list[tuple[float, float]]] = {model.name: [] for model in models}
        for step in range(WARM_UP + steps):
            for model in models:
                took, processor, _ = _step(model, tokens, context + step)
                times[model.name].append((took, processor))
    return FormatReport(
        machine=this_machine(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        layers=layers,
        vocabulary=dense.info.vocab,
        batch=batch,
        context=context,
        steps=steps,
        threads=torch.get_num_threads(),
        points=[
            FormatPoint(
                format=model.name,
                expert_bytes=model.expert_nbytes,
                all_bytes=model.nbytes,
                step_us=SpreadUs.of([took for took, _ in times[model.name][WARM_UP:]]),
                processor_us=SpreadUs.of([spent for _, spent in times[model.name][WARM_UP:]]),
                error=float((logits - first[0]).norm() / first[0].norm()),
            )
            for model, logits in zip(models, first, strict=True)
        ],
    )


def _step(model: FormatModel, tokens: Tensor, position: int) -> tuple[float, float, Tensor]:
    """(microseconds from tokens on the host to the next ones, of processors meanwhile, logits)"""
    batch = decode_batch(model, tokens, position)
    began, spent = time.perf_counter(), time.process_time()
    logits = model.runner.forward(batch)
    logits.argmax(dim=-1).tolist()
    took = time.perf_counter() - began
    return took * 1e6, (time.process_time() - spent) * 1e6, logits.clone()


def decode_batch(model: FormatModel, tokens: Tensor, position: int) -> ForwardBatch:
    """The next token of each sequence. tokens: [sequences]. position: theirs."""
    count = tokens.shape[0]
    ends = torch.arange(1, count + 1, dtype=torch.int64, device="cpu")
    return ForwardBatch(
        token_ids=tokens,
        positions=torch.full((count,), position, dtype=torch.int64, device="cpu"),
        query_start=torch.cat([ends.new_zeros(1), ends]).int(),
        context_len=torch.full((count,), position + 1, dtype=torch.int32, device="cpu"),
        block_tables=model.tables,
        slot_mapping=model.tables[:, position // BLOCK].long() * BLOCK + position % BLOCK,
        sample_rows=ends - 1,
    )
