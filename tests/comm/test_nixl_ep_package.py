"""Backend "nixl_ep" says before anything starts what is missing, and with what to repair it."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.nixl_backend_local import SPEC

from flexpert.comm import CommError, make_buffer
from flexpert.comm.nixl_ep import package
from flexpert.comm.nixl_ep.package import (
    check_capability,
    check_capacity,
    check_room,
    find,
    load,
    release,
)
from flexpert.device_settings import NIXL_EP_RANKS


def installed(monkeypatch: pytest.MonkeyPatch, version: str, module: Any = None) -> None:
    """As if this release were there; module: what importing it gives, or None for a failure."""

    def imported(name: str) -> Any:
        if module is None:
            raise ImportError("no extension for this torch")
        return module

    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(importlib, "import_module", imported)


def test_an_absent_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(CommError, match=r"pip install 'flexpert\[nixl\]'"):
        load("13", "2.13.0", (9, 0))
    with pytest.raises(CommError, match=r"for CUDA 12: pip install nixl-cu12"):
        load("12", "2.13.0", (9, 0))


def test_a_release_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.3.2", SimpleNamespace())
    with pytest.raises(CommError, match=r"needs nixl-cu13 1\.4 or later, 1\.3\.2 is installed"):
        load("13", "2.13.0", (9, 0))


def test_a_release_for_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.5.1")
    with pytest.raises(CommError, match=r"under torch 2\.11\.0.*for torch 2\.12 to 2\.14"):
        load("13", "2.11.0", (9, 0))


@pytest.mark.parametrize(("version", "fixed"), [("1.4.0", False), ("1.5.0", True), ("2.0", True)])
def test_graphs_need_a_release_that_heeds_num_experts(
    monkeypatch: pytest.MonkeyPatch, version: str, fixed: bool
) -> None:
    module = SimpleNamespace()
    installed(monkeypatch, version, module)
    found = load("13", "2.13.0", (9, 0))
    assert found.module is module
    assert found.fixed is fixed


def test_versions_are_compared_as_numbers() -> None:
    assert release("1.10.0.post1") > release("1.5.1") > release("1.5")
    assert release("nightly") < (1,)


@pytest.mark.parametrize(
    ("version", "taken", "refused"),
    [
        ((1, 4, 0), [(9, 0)], [(8, 6), (10, 0), (12, 0)]),
        ((1, 5, 1), [(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)], [(8, 6), (8, 9), (11, 0)]),
    ],
)
def test_a_gpu_that_a_release_has_no_code_for_is_refused(
    version: tuple[int, ...], taken: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    for capability in taken:
        check_capability(capability, version)
    for capability in refused:
        dotted = ".".join(map(str, capability))
        with pytest.raises(CommError, match=f"capability 9.0.* this one has {dotted}; backend"):
            check_capability(capability, version)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "INTERPRETED", False)
    with pytest.raises(CommError, match="needs a GPU"):
        find()
    with pytest.raises(CommError, match="needs a GPU"):
        make_buffer(0, SPEC, backend="nixl_ep", slots=4)


def test_more_experts_than_the_kernels_spread_are_refused() -> None:
    check_room(8, 128, 132)
    with pytest.raises(ValueError, match=r"is 2048 experts .* at most 1848 .* lower the capacity"):
        check_room(8, 256, 132)


def test_the_settings_take_the_capacities_that_the_backend_takes() -> None:
    def taken(capacity: int) -> bool:
        try:
            check_capacity(capacity)
        except ValueError:
            return False
        return True

    assert tuple(n for n in range(64) if taken(n)) == NIXL_EP_RANKS


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors would be on the GPU")
def test_a_size_that_its_kernels_refuse_is_told_with_their_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flexpert.compat import nixl_ep as compat

    class Picky(compat.Buffer):
        def dispatch(self, *args: Any, **options: Any) -> Any:
            raise RuntimeError('Assertion error: false and "Unsupported hidden"')

    found = package.Package(SimpleNamespace(Buffer=Picky, topk_idx_t=torch.int64), fixed=True)
    monkeypatch.setattr("flexpert.comm.nixl_ep.nixl_ep_buffer.find", lambda: found)
    with pytest.raises(ValueError, match="some hidden sizes only"):
        make_buffer(0, replace(SPEC, hidden=256), backend="nixl_ep", slots=4)
