"""The shape of the source: no circles, no two things of one name, the field's words."""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

# names that NVIDIA's interface dictates
DICTATED_MODULES = {"flexpert.compat.nixl_ep.buffer", "flexpert.compat.nixl_ep.utils"}
DICTATED_CLASSES = {
    "flexpert.compat.nixl_ep.buffer.Buffer",
    "flexpert.compat.nixl_ep.tuning.Config",
}

# words that this project once had for things that the field has words for
PRIVATE_WORDS = ("heir", "bequeath", "lend", "lent", "lender", "borrow", "borrowed", "rival")
PRIVATE_WORDS += ("contender", "pulse", "wording")
WITH_THOSE_WORDS = {"CHANGELOG.md", "test_structure.py"}


def imported(name: str) -> set[str]:
    """Modules of ours that a module imports anywhere in it, TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return (found & MODULES.keys()) - {name}


def circles() -> Iterator[list[str]]:
    """The strongly connected components of more than one module (Tarjan's algorithm)."""
    edges = {name: imported(name) for name in MODULES}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> Iterator[list[str]]:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                yield from visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                yield sorted(component)

    for name in MODULES:
        if name not in index:
            yield from visit(name)


def test_no_import_circle_has_more_than_two_modules() -> None:
    assert [circle for circle in circles() if len(circle) > 2] == []


def test_a_module_is_known_by_its_name() -> None:
    found = defaultdict(set)
    for name, path in MODULES.items():
        if path.stem != "__init__" and name not in DICTATED_MODULES:
            found[path.stem].add(name)
    twice = {stem: names for stem, names in found.items() if len(names) > 1}
    assert {stem: names for stem, names in twice.items() if not nested(names)} == {}


def nested(names: set[str]) -> bool:
    """One lies in a folder above the other: `flexpert.errors` and `flexpert.comm.errors`."""
    folders = sorted(name.rpartition(".")[0] + "." for name in names)
    return len(names) == 2 and folders[1].startswith(folders[0])


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them by their names alone, and collects only the first."""
    tests = Path(__file__).parent
    found = Counter(path.name for path in tests.rglob("test_*.py"))
    assert [name for name, times in found.items() if times > 1] == []


def test_a_public_class_is_known_by_its_name() -> None:
    found = defaultdict(set)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].add(f"{name}.{node.name}")
    twice = {name: places - DICTATED_CLASSES for name, places in found.items() if len(places) > 1}
    assert {name: places for name, places in twice.items() if len(places) > 1} == {}


def test_opentelemetry_is_imported_by_a_package_that_others_import_where_they_need_it() -> None:
    package = "flexpert.server.tracing"
    for name, tree in TREES.items():
        if name.startswith(package):
            continue
        for node in tree.body:  # not within functions
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not any(one.startswith(("opentelemetry", package)) for one in names), name


def test_no_class_of_ours_shadows_one_of_collections_abc() -> None:
    import collections.abc

    theirs = set(collections.abc.__all__)
    for name, tree in TREES.items():
        ours = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert ours.isdisjoint(theirs), name


def test_the_words_are_those_of_the_field() -> None:
    pattern = re.compile(rf"\b({'|'.join(PRIVATE_WORDS)})s?\b", re.IGNORECASE)
    for folder, kinds in (
        ("src", "*.py"),
        ("src", "*.c"),
        ("tests", "*.py"),
        ("docs", "*.md"),
        (".", "*.md"),
    ):
        paths = ROOT.glob(kinds) if folder == "." else (ROOT / folder).rglob(kinds)
        for path in paths:
            if path.name in WITH_THOSE_WORDS or "tiny" in path.parts:
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                found = pattern.search(line.replace("_", " "))
                assert found is None, f"{path.relative_to(ROOT)}:{number}: {found and found[0]}"
