"""What would become of a checkpoint if it were served with some settings, and why."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import torch

from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.processes.model_opening import open_source
from flexpert.cluster.processes.model_report import served_model
from flexpert.config import Config
from flexpert.engine.device_memory_plan import planned_device_memory
from flexpert.engine.device_profile import check_device, find_driver, uses_gpu
from flexpert.engine.gpu_driver import GpuDriver
from flexpert.engine.memory_plan import planned_memory
from flexpert.engine.rank_protocol import Memory
from flexpert.errors import ConfigError, FlexpertError
from flexpert.models.source import ModelSource
from flexpert.models.weight_reading import read_everything
from flexpert.moe.placement import Placement, replan


class CheckedFamily(msgspec.Struct, frozen=True):
    """What the model is. layers: that mix tokens, by attention or otherwise. context: tokens of
    prompt and answer together. stateful_layers: that keep a state of each sequence, state_nbytes of
    it in all. drafts: the last of the layers proposes tokens."""

    model_type: str
    architecture: str
    layers: int
    moe_layers: int
    experts: int
    topk: int
    hidden: int
    vocab: int
    context: int
    stateful_layers: int = 0
    state_nbytes: int = 0
    drafts: bool = False


class CheckedFiles(msgspec.Struct, frozen=True):
    """What is in the files.

    format: of the weights. dtypes: safetensors' name → bytes, of all tensors. passed_over: files
    beside them that are not read. used: tensors.
    """

    names: list[str]
    nbytes: int
    format: str
    dtypes: dict[str, int]
    passed_over: list[str]
    used: int
    used_nbytes: int


class SkippedKind(msgspec.Struct, frozen=True):
    """Tensors of one kind that are not read. example: the name of one."""

    kind: str
    reason: str
    tensors: int
    nbytes: int
    example: str


class CheckedRank(msgspec.Struct, frozen=True):
    """What a rank needs, planned: of the host, and of its GPU if it has one. experts: replicas."""

    rank: int
    experts: int
    host: Memory
    device: Memory | None


class ModelCheck(msgspec.Struct, frozen=True):
    """What would happen.

    reason: why it would not be served; None: it would be. in_memory: dtypes of the dense weights
    and of the experts. remarks: what else to know. read_s: how long reading all weights took; None:
    they were not read.
    """

    model: str
    served: bool
    reason: str | None
    family: CheckedFamily | None
    files: CheckedFiles | None
    in_memory: dict[str, str]
    skipped: list[SkippedKind]
    ranks: list[CheckedRank]
    remarks: list[str]
    seconds: float
    read_s: float | None


def check_model(config: Config, *, read_weights: bool = False) -> ModelCheck:
    """Open a checkpoint, account for its tensors, plan the memory of its ranks.

    read_weights: also all weights, as ranks would load them, so that numbers that are not finite
        are found.
    """
    began = time.monotonic()
    remarks: list[str] = []
    source: ModelSource | None = None
    reason: str | None = None
    ranks: list[CheckedRank] = []
    read_s = None
    try:
        source = open_source(config)
        placement = _placement(config, source)
        ranks = _planned(config, source, placement)
        tokenizer = None if config.model.skip_tokenizer_init else source.tokenizer()
        model = served_model(source, config, tokenizer)  # what the head reads at its start
        MemoryBudget(config, model, _driver(config, remarks)).check(placement.ranks, placement)
        if read_weights:
            reading = time.monotonic()
            read_everything(source)
            read_s = time.monotonic() - reading
    except ConfigError:
        raise
    except FlexpertError as error:
        reason = str(error)
    return ModelCheck(
        model=config.model.model,
        served=reason is None,
        reason=reason,
        family=_family(source) if source else None,
        files=_files(source) if source else None,
        in_memory=_in_memory(source) if source else {},
        skipped=_skipped(source) if source else [],
        ranks=ranks,
        remarks=remarks,
        seconds=time.monotonic() - began,
        read_s=read_s,
    )


def _placement(config: Config, source: ModelSource) -> Placement:
    """Of the ranks at the start."""
    return replan(
        None,
        range(max(1, config.cluster.ranks)),
        experts=source.info.experts,
        layers=source.info.moe_layers,
        redundant=config.cluster.redundant_experts,
    )


def _planned(config: Config, source: ModelSource, placement: Placement) -> list[CheckedRank]:
    engine, capacity = config.engine, config.cluster.max_ranks
    members = len(placement.ranks)
    device = engine.device == "cuda"
    return [
        CheckedRank(
            rank,
            count := placement.count(rank),
            planned_memory(source, engine, capacity, count, members),
            planned_device_memory(source, engine, capacity, count) if device else None,
        )
        for rank in placement.ranks
    ]


def _driver(config: Config, remarks: list[str]) -> GpuDriver | None:
    try:
        check_device(config.engine)
    except ConfigError as error:
        remarks.append(f"this machine could not start it: {error}")
        return None
    driver = find_driver() if uses_gpu(config.engine) else None
    if driver is None and config.engine.device == "cuda":
        remarks.append("NVML does not say how much memory the GPUs have: it is not checked")
    return driver


def _family(source: ModelSource) -> CheckedFamily:
    info = source.info
    attention = tuple(f"{name}." for name in source.attention_names)
    return CheckedFamily(
        info.model_type,
        info.architecture,
        len(attention) + sum(not name.startswith(attention) for name in source.state_names),
        info.moe_layers,
        info.experts,
        info.topk,
        info.hidden,
        info.vocab,
        info.max_model_len,
        len(info.states),
        info.state_nbytes,
        info.drafts,
    )


def _files(source: ModelSource) -> CheckedFiles:
    files, accounting = source.checkpoint.files, source.accounting
    return CheckedFiles(
        list(files.names),
        files.nbytes,
        files.format,
        dict(files.dtypes.most_common()),
        list(files.passed_over),
        accounting.used,
        accounting.used_nbytes,
    )


def _in_memory(source: ModelSource) -> dict[str, str]:
    weights = source.expert_shape().weights
    experts = _name(weights) if isinstance(weights, torch.dtype) else weights.name
    return {"dense": _name(source.info.dtype), "experts": experts}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _skipped(source: ModelSource) -> list[SkippedKind]:
    return [
        SkippedKind(kind.kind, kind.reason, len(kind.keys), kind.nbytes, kind.keys[0])
        for kind in source.accounting.skipped
    ]


def dealt_alike(ranks: Sequence[CheckedRank]) -> list[list[CheckedRank]]:
    """Ranks in groups that need the same, in their order."""
    groups: dict[tuple[object, ...], list[CheckedRank]] = {}
    for one in ranks:
        groups.setdefault((one.experts, one.host, one.device), []).append(one)
    return list(groups.values())
