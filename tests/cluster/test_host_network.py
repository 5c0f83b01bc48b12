"""Ranks reach each other over the interfaces and ports that the settings name."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import psutil
import pytest
from support.service import answer_all, requests, running

from flexpert.cli.settings import settings
from flexpert.cluster.processes.early_fork_server import for_hosts
from flexpert.config import EngineConfig, load_config
from flexpert.engine.host_network import check_network, choose_network, interfaces
from flexpert.errors import ConfigError

LOW, HIGH = 21500, 21539


def test_an_interface_that_is_not_there_is_named_with_those_that_are() -> None:
    check_network(EngineConfig(interface="lo"))
    check_network(EngineConfig())
    with pytest.raises(ConfigError, match=r"no network interface 'wlan7' here") as raised:
        check_network(EngineConfig(interface="lo, wlan7"))
    for name in interfaces():
        assert name in str(raised.value)


def test_what_is_set_goes_before_the_environment_and_what_is_not_leaves_it() -> None:
    environment = {"UCX_NET_DEVICES": "eth7", "UCX_TLS": "tcp"}
    choose_network(EngineConfig(), environment)
    assert environment == {"UCX_NET_DEVICES": "eth7", "UCX_TLS": "tcp"}
    choose_network(EngineConfig(interface="lo, eth0", port_range="1-2"), environment)
    expected = {"UCX_NET_DEVICES": "lo,eth0", "UCX_TLS": "tcp", "UCX_TCP_PORT_RANGE": "1-2"}
    assert environment == expected


@pytest.mark.parametrize("text", ["20000", "0-5", "9-8", "1-65536", "a-b", "1-2-3", ""])
def test_what_is_no_range_of_ports_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no range of ports; write 20000-20100"):
        settings(None, {"engine.port_range": text})


def test_hosts_that_join_have_interfaces_of_their_own_and_the_ports_of_all() -> None:
    overrides: dict[str, Any] = {"engine.interface": "lo", "engine.port_range": "5-9"}
    told = json.loads(for_hosts(load_config(environment={}, overrides=overrides)))["engine"]
    assert "interface" not in told
    assert told["port_range"] == "5-9"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
    reason="pip install 'flexpert[nixl]' to test it",
)
def test_ranks_listen_on_that_interface_and_those_ports_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    with running(
        cluster__ranks=2,
        cluster__max_ranks=3,
        engine__kv_memory="16MiB",
        engine__transport="nixl",
        engine__interface="lo",
        engine__port_range=f"{LOW}-{HIGH}",
    ) as service:
        service.run(answer_all(service.head, requests(2, tokens=5), clients=2))
        assert service.change(ranks=3).state == "done"  # memory is read over it, too
        heard = [
            connection.laddr
            for rank in service.head.cluster().ranks
            for connection in psutil.Process(rank.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
    assert len(heard) >= 3
    assert {address.ip for address in heard} == {"127.0.0.1"}
    assert all(LOW <= address.port <= HIGH for address in heard), heard
    assert len({address.port for address in heard}) == len(heard)
