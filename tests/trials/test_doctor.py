"""`flexpert doctor`: what each fact is taken for, and that this machine's can be told."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from flexpert.cli.main import app
from flexpert.trials.doctor import host_facts
from flexpert.trials.doctor.host_checks import Device, Finding, best_set, findings, works
from flexpert.trials.doctor.host_facts import GpuFact, HostFacts, PackageFact, Tried

GIB = 2**30
AVX512 = ["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"]
GOOD = HostFacts(
    system="Linux 6.8.0",
    machine="x86_64",
    python="3.12.1",
    cores=8,
    quota=None,
    cpu_flags=AVX512,
    memory=64 * GIB,
    memory_available=48 * GIB,
    memory_limit=None,
    shm=32 * GIB,
    files=(1024, 524288),
    locked=(-1, -1),
    processes=(-1, -1),
    memfd="",
    pidfd="",
    extensions=Tried("avx512"),
    packages=[
        PackageFact("torch", "2.13.0", "<=2.13.0,>=2.11"),
        PackageFact("transformers", "5.24.0", ">=5.17"),
        PackageFact("triton", "3.9.0", ">=3.6", "cuda"),
        PackageFact("nixl-cu13", "1.5.0", ">=1.5", "nixl"),
    ],
    nixl=Tried("UCX"),
    port=8000,
    port_error="",
    clock="tsc",
    clock_ns=40.0,
    synchronised=True,
    driver="570.86",
    gpus=[GpuFact("H100", (9, 0), [1], 80 * GIB), GpuFact("H100", (9, 0), [0], 80 * GIB)],
    gpu_error="",
    mps=False,
)


def judged(device: Device = "cpu", **changed: Any) -> dict[str, Finding]:
    facts = msgspec.structs.replace(GOOD, **changed)
    return {one.check: one for one in findings(facts, device)}


def test_a_machine_with_everything_is_fine() -> None:
    for device in ("cpu", "cuda"):
        assert {one.verdict for one in judged(device).values()} == {"fine"}


@pytest.mark.parametrize(
    ("check", "changed"),
    [
        ("system", {"system": "Darwin 24.1"}),
        ("system", {"system": "Linux 4.18.0"}),
        ("memory", {"memory_limit": GIB // 2}),
        ("shared memory", {"memfd": "Permission denied"}),
        ("pidfd", {"pidfd": "Operation not permitted"}),
        ("open files", {"files": (32, 32)}),
        ("C parts", {"extensions": Tried(error="ImportError: no module")}),
        ("package torch", {"packages": [PackageFact("torch", None, ">=2.11", fits=False)]}),
    ],
)
def test_without_these_nothing_is_served(check: str, changed: dict[str, Any]) -> None:
    found = judged(**changed)
    assert found[check].verdict == "broken"
    assert found[check].means
    assert found[check].mend
    assert not works(found.values())


@pytest.mark.parametrize(
    ("check", "changed"),
    [
        ("cores", {"quota": 0.5}),
        ("/dev/shm", {"shm": None}),
        ("open files", {"files": (1024, 1024)}),
        ("locked memory", {"locked": (65536, 65536)}),
        ("C parts", {"extensions": Tried("avx2")}),
        ("C parts", {"extensions": Tried("portable"), "cpu_flags": []}),
        ("package torch", {"packages": [PackageFact("torch", "2.9", ">=2.11", fits=False)]}),
        ("packages", {"packages": []}),
        ("NIXL", {"nixl": Tried(error="not installed")}),
        ("GPUs", {"driver": ""}),
        ("GPUs", {"gpus": [], "gpu_error": "the driver is too old"}),
        ("port", {"port_error": "Address already in use"}),
        ("clock", {"clock_ns": 4000.0}),
        ("clock", {"synchronised": False}),
        ("MPS", {"mps": True}),
    ],
)
def test_without_these_a_cpu_serves_all_the_same(check: str, changed: dict[str, Any]) -> None:
    found = judged(**changed)
    assert found[check].verdict == "without"
    assert works(found.values())


@pytest.mark.parametrize(
    ("check", "changed"),
    [
        ("GPUs", {"driver": ""}),
        ("GPUs", {"gpus": []}),
        ("GPU age", {"gpus": [GpuFact("V100", (7, 0), [], GIB)]}),
        ("peer access", {"gpus": [GpuFact("A", (9, 0), [], GIB), GpuFact("A", (9, 0), [], GIB)]}),
        ("Triton", {"packages": [PackageFact("triton", None, ">=3.6", "cuda", fits=False)]}),
    ],
)
def test_without_these_no_gpu_serves(check: str, changed: dict[str, Any]) -> None:
    assert judged("cuda", **changed)[check].verdict == "broken"
    assert works(judged("cpu", **changed).values())


def test_the_instruction_set_is_the_largest_that_there_are_kernels_for() -> None:
    assert best_set(["avx2", "fma", "avx512f"]) == "avx2"
    assert best_set([*AVX512, "amx_tile", "amx_bf16", "avx512_bf16"]) == "amx"


@pytest.mark.parametrize("able", [True, False])
def test_the_exit_status_says_whether_serving_can_work(
    able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = GOOD if able else msgspec.structs.replace(GOOD, memfd="Permission denied")
    monkeypatch.setattr(host_facts, "gather", lambda port: facts)
    ran = CliRunner().invoke(app, ["doctor", "--json"])
    assert ran.exit_code == (0 if able else 1)
    assert json.loads(ran.stdout)["works"] is able
    shown = CliRunner().invoke(app, ["doctor"])
    assert ("serving works here" in shown.stdout) is able


@pytest.mark.slow
def test_this_machine_can_be_told() -> None:
    """The suite runs on it, so that it serves."""
    facts = host_facts.gather(port=8000)
    assert facts.extensions.said in ("portable", "avx2", "avx512", "avx512_bf16", "amx")
    assert facts.memfd == facts.pidfd == facts.extensions.error == ""
    assert any(one.name == "torch" and one.installed for one in facts.packages)
    assert works(findings(facts, "cpu"))
