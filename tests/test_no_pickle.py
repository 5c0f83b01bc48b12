"""No source of flexpert reads or writes what can run code, or has torch open a port for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("multiprocessing", "torch.multiprocessing"),
}
NAMES = {
    *("ProcessPoolExecutor", "TCPStore", "all_gather_object", "broadcast_object_list"),
    *("gather_object", "scatter_object_list", "send_object_list", "recv_object_list"),
}
CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "eval", "exec"}


def found_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                modules = [module, *(f"{module}.{name}" for name in modules), *modules]
            for name in modules:
                parents = name.split(".")
                if MODULES & {".".join(parents[: n + 1]) for n in range(len(parents))}:
                    yield f"{node.lineno}: imports {name}"
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute | ast.Name):
            names = (
                {alias.name for alias in node.names}
                if isinstance(node, ast.Import | ast.ImportFrom)
                else {node.attr if isinstance(node, ast.Attribute) else node.id}
            )
            for name in sorted(names & NAMES):
                yield f"{node.lineno}: uses {name}"
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in CALLS:
            yield f"{node.lineno}: calls {name}"


@pytest.mark.parametrize("folder", ["src", "tools", "examples"])
def test_nothing_that_runs_what_it_reads(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{place}"
        for file in files
        for place in found_in(file.read_text())
    ]
    if folder == "examples":  # one shows what a user brings along: a store of torch's
        found = [place for place in found if not place.endswith("uses TCPStore")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing.connection import Connection",
        "import multiprocessing.pool as pool",
        "from torch import multiprocessing",
        "import torch\ntorch.load('x')",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch.distributed import TCPStore",
        "from concurrent.futures import ProcessPoolExecutor",
        "eval('1')",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert list(found_in(source))
