"""Whatever a user names as settings, plan or prompts: it is one, or a clear error; nothing else."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexpert.bench.prompts import read_prompts
from flexpert.config import Config, load_config
from flexpert.errors import ConfigError
from flexpert.reading import is_open_to_others, read_text
from flexpert.trials.plan import plan_file
from flexpert.trials.plan.plan_file import PlanPhase

READERS: dict[str, Callable[[Path], object]] = {
    "settings": lambda file: load_config(file=file, environment={}),
    "plan": plan_file.load,
    "prompts": lambda file: read_prompts(file, 2),
}
reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
SETTINGS = {
    section: sorted(type(tree).model_fields)
    for section, tree in Config()  # its own sections
}
NUMBERS = {
    f"{section}.{name}": getattr(tree, name)
    for section, tree in Config()
    for name, field in type(tree).model_fields.items()
    if "int" in str(field.annotation) or "float" in str(field.annotation)
}
ODD = st.sampled_from(
    [
        *("", "nan", "-inf", "1e400GiB", "nanGiB", "infGiB", "NaN", "Infinity", "-1", "2**70"),
        *(str(2**70), "1" * 5000, "\0", "a\0b", "\ud800", "\\g<0>", "true", "0x10", "1_000", "é"),
    ]
) | st.text(max_size=8)


def attempt(work: Callable[..., object], *arguments: Any, **named: Any) -> tuple[object, str]:
    """What it returns, or its complaint."""
    try:
        return work(*arguments, **named), ""
    except ConfigError as error:
        complaint = str(error)
    assert complaint
    assert len(complaint) < 2000
    return None, complaint


def outcome(read: Callable[[Path], object], data: bytes, suffix: str) -> object:
    """What comes of a file with this in it: what was read, or None, after a complaint."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        began = time.monotonic()
        found, _ = attempt(read, Path(file.name))
        assert time.monotonic() - began < 20
    return found


# ---- any content --------------------------------------------------------------------------------


@reader
@settings(deadline=None, max_examples=120)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".yaml", ".json", ".jsonl"]))
@example(data=b"[" * 60_000, suffix=".json")
@example(data=b"[" * 60_000, suffix=".yaml")
@example(data=b'{"a":' * 10_000, suffix=".json")
@example(data=b'{"prompt":"x","y":' + b"[" * 60_000, suffix=".jsonl")
@example(data=b"- " * 20_000, suffix=".yaml")
@example(data=b"1" * 5000, suffix=".json")
@example(data=b"[[" + b"1" * 5000 + b"]]", suffix=".json")
@example(data=b"\xff\xfe\x00", suffix=".yaml")
@example(data=b"\xef\xbb\xbf[[0]]", suffix=".json")
@example(data=b"a\x00b", suffix=".yaml")
def test_any_bytes(read: Callable[[Path], object], data: bytes, suffix: str) -> None:
    outcome(read, data, suffix)


@reader
@settings(deadline=None, max_examples=150)
@given(tree=ANY_JSON, suffix=st.sampled_from([".yaml", ".json"]))
def test_any_json(read: Callable[[Path], object], tree: Any, suffix: str) -> None:
    outcome(read, json.dumps(tree).encode(), suffix)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(sorted(SETTINGS)),
        st.dictionaries(
            st.sampled_from(sorted({name for names in SETTINGS.values() for name in names})),
            ANY_JSON | ODD,
            max_size=3,
        ),
        max_size=3,
    )
)
def test_any_values_of_settings(tree: Any) -> None:
    found = outcome(READERS["settings"], json.dumps(tree).encode(), ".json")
    assert found is None or isinstance(found, Config)


TAGS = ("!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!set", "!!omap", "!!pairs")


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(
            [
                *TAGS,
                *("!!python/object/apply:os.getcwd", "&a", "*a", "<<:", "cluster:", "ranks:", "- "),
                *("? ", ": ", "''", "[", "]", "{", "}", "\n", "\n  ", "|", ">", "=", "%YAML 1.1"),
                *("---", "...", "0o9", "2024-99-99", ".inf", ".nan", "1:99:99", "#", "\t", "~"),
            ]
        ),
        max_size=12,
    )
)
@example(["!!int ''"])
@example(["!!bool maybe"])
@example(["!!timestamp x"])
@example(["cluster: {=: 1}"])
def test_any_yaml(words: list[str]) -> None:
    outcome(READERS["settings"], " ".join(words).encode(), ".yaml")


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(st.integers(-5, 5) | st.integers() | ANY_JSON, max_size=4)
        | st.fixed_dictionaries({}, optional={"ranks": ANY_JSON, "kill": ANY_JSON}),
        max_size=4,
    )
    | ANY_JSON
)
@example([{"ranks": 5}])
@example([{"ranks": None}])
@example([{"ranks": [0], "kill": {"0": 1}}])
def test_any_plan(tree: Any) -> None:
    plan, complaint = attempt(plan_file.parse, tree)
    assert plan or complaint
    if isinstance(plan, list):
        for phase in plan:
            assert isinstance(phase, PlanPhase)
            assert set(phase.kill) < set(phase.ranks)
            assert list(phase.ranks) == sorted(set(phase.ranks))


# ---- what is bounded ----------------------------------------------------------------------------


def test_references_are_refused_with_the_line() -> None:
    """Nine lines of them stand for a billion values."""
    laughs = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(laughs)
        file.flush()
        with pytest.raises(ConfigError, match=r"line 2 has a reference \(\*\)"):
            load_config(file=Path(file.name), environment={})


@reader
def test_a_file_without_an_end_is_refused(read: Callable[[Path], object]) -> None:
    if read is READERS["prompts"]:
        return  # it may be large; see the next
    with pytest.raises(ConfigError, match="/dev/zero is larger than"):
        read(Path("/dev/zero"))


def test_the_bound_holds_for_devices_and_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x" * 1024)
    assert len(read_text(file, "it", most=1024)) == 1024
    for path in (file, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is larger than 0 KiB"):
            read_text(path, "it", most=1023)


@reader
def test_what_is_no_file_is_said(read: Callable[[Path], object], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, says in (
        (tmp_path, "Is a directory"),
        (tmp_path / "nowhere", "No such file"),
        (tmp_path / "x" / "y", "No such file"),
        (Path("a\0b"), "null byte"),
        (pipe, "nothing comes out of"),
        (Path("/dev/null"), "nothing comes out of"),
        (Path("/proc/self/mem"), "Input/output error"),
    ):
        with pytest.raises(ConfigError, match=says):
            read(path)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """As `--config <(command)` gives one."""
    ours, theirs = os.pipe()

    def write() -> None:
        for part in (b"cluster:\n", b"  ranks: 3\n"):
            os.write(theirs, part)
        os.close(theirs)

    writer = threading.Thread(target=write)
    writer.start()
    config = load_config(file=Path(f"/dev/fd/{ours}"), environment={})
    writer.join()
    os.close(ours)
    assert config.cluster.ranks == 3


def test_a_pipe_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.reading._LIMIT_S", 0.05)
    ours, theirs = os.pipe()
    try:
        with pytest.raises(ConfigError, match=r"did not end within 0\.05 s"):
            load_config(file=Path(f"/dev/fd/{ours}"), environment={})
    finally:
        os.close(ours)
        os.close(theirs)


def test_an_empty_section_is_one_with_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("cluster:\n# ranks: 3\nserver:\n  port: 1\n")
    config = load_config(file=file, environment={"FLEXPERT_CLUSTER__RANKS": "2"})
    assert (config.cluster.ranks, config.server.port) == (2, 1)


# ---- numbers and the environment ----------------------------------------------------------------


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "-1", "1e400", str(2**70), "1" * 5000, "-0.5", "1e400GiB", ""]
)
def test_no_setting_takes_a_number_that_cannot_be(path: str, value: str) -> None:
    for given_value in (value, _number(value)):
        with pytest.raises(ConfigError) as caught:
            load_config(environment={}, overrides={path: given_value})
        assert path.split(".")[1] in str(caught.value)


def _number(text: str) -> object:
    """As JSON and YAML hand it over."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    "size", ["1e400GiB", "nanGiB", "infGiB", "-1GiB", "1e30TiB", "GiB", "1ZiB"]
)
def test_sizes_that_cannot_be_are_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="kv_memory"):
        load_config(environment={"FLEXPERT_ENGINE__KV_MEMORY": size})


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.builds(
            lambda *parts: "FLEXPERT_" + "__".join(parts),
            st.sampled_from([*map(str.upper, SETTINGS), "", "X", "É"]),
            st.sampled_from(sorted({n.upper() for names in SETTINGS.values() for n in names}))
            | st.sampled_from(["", "RANKS__X", "_", "__"]),
        ),
        ODD,
        max_size=4,
    )
)
def test_any_environment(environment: dict[str, str]) -> None:
    config, complaint = attempt(load_config, environment=environment)
    assert config or complaint
    if isinstance(config, Config):
        config.model_dump_json().encode()  # as the fork server is told


@pytest.mark.parametrize(
    ("mode", "owner", "me", "is_open"),
    [
        (0o600, 1000, 1000, False),
        (0o640, 1000, 1000, True),
        (0o440, 0, 1000, False),  # Kubernetes with fsGroup, systemd with LoadCredential
        (0o460, 0, 1000, True),
        (0o444, 0, 1000, True),
        (0o440, 0, 0, True),
        (0o440, 1001, 1000, True),
    ],
)
def test_a_secret_may_be_read_by_its_user_or_handed_over_by_root(
    mode: int, owner: int, me: int, *, is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: me)
    status = os.stat_result((0o100000 | mode, 0, 0, 1, owner, 1000, 0, 0, 0, 0))
    assert is_open_to_others(status) == is_open
