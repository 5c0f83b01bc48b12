"""The memory of a GPU as a service plans, measures and shows it; refused where there is too little.

In Triton's interpreter: windows, KV cache and experts are then files in the host's memory, whose
sizes the kernel tells, and the driver is planted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from support.service import Service, change, running, until
from transformers import AutoConfig, AutoModelForCausalLM

from flexpert.cluster.head import Head
from flexpert.cluster.views import RankView
from flexpert.display.render import cluster_view
from flexpert.engine.gpu_driver import GpuMemory
from flexpert.errors import OperationRefused
from flexpert.models.source import ModelSource
from flexpert.moe.cuda import device_expert_store

pytest.importorskip("triton", reason="the GPU kernels need the package triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 2**20


class Gpus:
    """Two GPUs with so much free."""

    gpus = 2

    def __init__(self, free: int) -> None:
        self.free = free

    def memory(self, gpu: int) -> GpuMemory | None:
        return GpuMemory(80 * 1024 * MIB, self.free)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its experts are most of it."""
    path = tmp_path_factory.mktemp("small")
    tokenizer = ModelSource.open("tiny").tokenizer()
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=32,
        moe_intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=12,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def opened(model: str, gpus: Gpus, patch: pytest.MonkeyPatch) -> Iterator[Service]:
    patch.setattr(Head, "_gpu_driver", lambda *_: gpus)
    with running(
        model__model=model,
        model__dtype="float32",
        engine__device="cuda",
        engine__max_tokens_per_step=16,
        engine__max_running=3,
        engine__kv_memory="4MiB",
        engine__kv_block_size=4,
        cluster__ranks=2,
        cluster__max_ranks=4,
        cluster__expert_cache=0,  # ranks have it open as they have what they export
        cluster__exchange_timeout=60.0,
        cluster__stall_timeout=30.0,
    ) as service:
        yield service


def in_files(rank: RankView, head: Head) -> int:
    """Bytes of what a rank exports, and of its window, as the kernel has them."""
    descriptors: Counter[int] = Counter()
    sizes = {}
    for fd in Path(f"/proc/{rank.pid}/fd").iterdir():
        if os.readlink(fd).startswith("/memfd:flexpert-exported"):
            found = fd.stat()
            descriptors[found.st_ino] += 1
            sizes[found.st_ino] = found.st_size
    # the owner has the descriptor and its mapping's copy of it, a peer only the latter
    owned = sum(size for file, size in sizes.items() if descriptors[file] == 2)
    directory = device_expert_store._Directory.size(head.info.moe_layers, head.info.experts)
    return owned - directory


def as_planned(rank: RankView) -> bool:
    held = rank.device_memory_bytes - rank.device_spare_bytes
    return held == pytest.approx(rank.device_planned_bytes, rel=0.1)


def check(head: Head, dense: int) -> None:
    """Plan, measurement and kernel agree."""
    ranks = head.cluster().ranks
    for rank in ranks:
        assert as_planned(rank), rank
        assert rank.device_memory_bytes == pytest.approx(in_files(rank, head) + dense, rel=0.1)
        assert 0 < rank.memory_bytes < rank.planned_bytes
        sample = head.registry.get_sample_value
        labels = {"rank": str(rank.id)}
        assert sample("flexpert_rank_device_memory_bytes", labels) == rank.device_memory_bytes
        assert sample("flexpert_rank_device_spare_bytes", labels) == rank.device_spare_bytes


def shown(head: Head) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(cluster_view(head.cluster()))
    return capture.get()


def test_what_is_planned_measured_and_shown_is_what_ranks_take(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(free=8 * 1024 * MIB)
    dense = ModelSource.open(model, dtype="float32").dense_nbytes()

    async def scenario(head: Head) -> None:
        check(head, dense)
        first = head.cluster().ranks[0]
        assert f"{first.device_memory_bytes / MIB:.0f} MiB" in shown(head)
        gpus.free = first.device_planned_bytes // 2
        with pytest.raises(OperationRefused, match=r"GPU 0 .* rank 2 needs .* more there"):
            head.begin_operation(ranks=3)
        assert [rank.id for rank in head.cluster().ranks] == [0, 1]
        gpus.free = first.device_planned_bytes * 2
        assert (await change(head, ranks=3)).state == "done"
        # measured again with a tenth of stall_timeout, also of those that gave experts away
        await until(lambda: all(as_planned(rank) for rank in head.cluster().ranks), 60)
        check(head, dense)
        assert head.cluster().ranks[0].device_planned_bytes < first.device_planned_bytes

    for service in opened(model, gpus, monkeypatch):
        service.run(scenario(service.head))


def test_a_service_that_has_no_room_is_refused_before_a_rank_is_started(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    monkeypatch.setattr(Head, "spawn", lambda head, rank: started.append(rank))
    with pytest.raises(OperationRefused, match=r"GPU 0 has 20 MiB of its 81,920 MiB free"):
        next(opened(model, Gpus(free=20 * MIB), monkeypatch))
    assert started == []
