"""Promises about keys: where they come from, that they are needed, and that nobody sees them."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path

import pytest
from support.fake_head import FakeHead

from flexpert.cli.settings import settings
from flexpert.config import Config, ServerConfig, load_config
from flexpert.errors import ConfigError
from flexpert.server.keys import BearerKeys, read_keys
from flexpert.server.service_process import bind, serve

SECRET = "s3cret-äöü"


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "key"
    file.write_bytes(content)
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    "content", [SECRET, f"{SECRET}\n", f"  {SECRET} \r\nanother line\n", f"{SECRET}\n\n"]
)
def test_a_key_is_the_first_line_of_its_file(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, content.encode())
    assert read_keys(ServerConfig(api_key_file=file)) == BearerKeys(
        SECRET.encode(), SECRET.encode()
    )
    both = ServerConfig(api_key="a", control_key_file=file)
    assert read_keys(both) == BearerKeys(b"a", SECRET.encode())
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no key in its first line"),
        (b"\n", "no key in its first line"),
        (b"  \nkey", "no key in its first line"),
        (b"a\0b\n", "no key in its first line"),
        (b"\xff\xfe\n", "not text"),
        (b"x" * 10**6, "larger than 64 KiB"),
    ],
)
def test_a_file_without_a_key_is_a_wrong_setting(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    file = key_file(tmp_path, content)
    with pytest.raises(ConfigError, match=f"server.api_key_file.*{complaint}"):
        read_keys(ServerConfig(api_key_file=file))


def test_a_pipe_that_nobody_writes_into_is_a_wrong_setting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="nothing comes out of"):
        read_keys(ServerConfig(api_key_file=tmp_path / "pipe"))


def test_a_file_that_cannot_be_read_is_a_wrong_setting(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path, Path("a\0b")):
        with pytest.raises(ConfigError, match=r"cannot read server\.control_key_file"):
            read_keys(ServerConfig(control_key_file=file))


def test_a_file_that_others_can_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = key_file(tmp_path, SECRET.encode(), 0o644)
    assert read_keys(ServerConfig(api_key_file=file)).api == SECRET.encode()
    assert "chmod 600" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("key", ["", "  ", "a\n", "\tb", "a\0b"])
def test_a_key_that_is_none_is_a_wrong_setting(key: str) -> None:
    for name in ("api_key", "control_key"):
        with pytest.raises(ConfigError, match=rf"server\.{name}"):
            load_config(environment={f"FLEXPERT_SERVER__{name.upper()}": key})


def test_a_key_has_one_source(tmp_path: Path) -> None:
    file = key_file(tmp_path, b"a")
    environment = {"FLEXPERT_SERVER__API_KEY": "b"}
    with pytest.raises(ConfigError, match="api_key and api_key_file are both set"):
        load_config(environment=environment, overrides={"server.api_key_file": str(file)})


def test_no_complaint_repeats_a_key() -> None:
    for overrides in (
        {"server.api_key": f"{SECRET}\n"},
        {"server.api_key": SECRET, "server.port": "x"},
        {"server.control_key": f" {SECRET}", "cluster.ranks": 0},
    ):
        with pytest.raises(ConfigError) as raised:
            settings(None, overrides)
        assert SECRET not in str(raised.value)
        assert SECRET not in repr(raised.value)


def test_settings_that_are_shown_or_handed_to_ranks_hide_the_keys() -> None:
    config = Config(server=ServerConfig(api_key=SECRET, control_key=f"2{SECRET}"))
    keys = read_keys(config.server)
    for shown in (repr(config), str(config), config.model_dump_json(), repr(keys), str(keys)):
        assert SECRET not in shown
        assert repr(SECRET.encode())[2:-1] not in shown
    handed = Config.model_validate_json(config.model_dump_json())  # as ranks read it
    assert handed.cluster == config.cluster


LOCAL = ("127.0.0.1", "localhost", "127.9.9.9", "::1")


@pytest.mark.parametrize("host", LOCAL)
def test_this_machine_needs_no_key(host: str) -> None:
    if host == "::1" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    bind(ServerConfig(host=host, port=0)).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key_or_leave(host: str) -> None:
    if host == "::" and not _has_ipv6():
        pytest.skip("no IPv6 here")
    open_ = ServerConfig(host=host, port=0)
    for keys in (None, BearerKeys(), BearerKeys(control=b"only to scale")):
        with pytest.raises(ConfigError) as raised:
            bind(open_, keys)
        for way in ("--api-key-file", "FLEXPERT_SERVER__API_KEY", "--insecure"):
            assert way in str(raised.value)
    bind(open_, BearerKeys(api=b"key")).close()
    bind(open_.model_copy(update={"insecure": True})).close()


def test_serve_refuses_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for server in (
        ServerConfig(host="0.0.0.0", port=0),
        ServerConfig(api_key_file=tmp_path / "none"),
        ServerConfig(host="a..b"),
    ):
        config = Config(server=server)
        assert serve(config, head=lambda config: pytest.fail("started")) == 2
        assert re.match(r"flexpert: (cannot read )?server\.", capsys.readouterr().err)


def test_nothing_that_is_served_or_logged_shows_a_key(caplog: pytest.LogCaptureFixture) -> None:
    import httpx
    from support.served_head import Running

    with caplog.at_level(logging.DEBUG):
        running = Running(ServerConfig(api_key=SECRET))
        try:
            headers = [(b"authorization", f"Bearer {SECRET}".encode())]
            paths = ("/cluster", "/v1/models", "/metrics", "/openapi.json", "/none", "/health")
            for path in paths:
                for given in (headers, []):
                    assert SECRET not in httpx.get(running.url + path, headers=given).text
        finally:
            running.close()
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("http", "hpack"))]
    assert not [message for message in ours if SECRET in message]
    assert SECRET not in repr(FakeHead(Config(server=ServerConfig(api_key=SECRET))))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return os.path.exists("/proc/net/if_inet6")
