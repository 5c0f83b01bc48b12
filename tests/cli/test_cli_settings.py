"""Flags come from the settings tree: all of them, with its help, and they reach it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from pydantic import SecretStr
from typer.testing import CliRunner

from flexpert.cli.settings import flags, with_settings
from flexpert.config import Config, load_config
from flexpert.errors import ConfigError


def invoke(*arguments: str) -> Config:
    seen: list[Config] = []

    def command(config: Config) -> None:
        seen.append(config)

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(with_settings(command))
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_setting_has_a_flag_with_help() -> None:
    fields = {f"{section}.{name}" for section, tree in Config() for name in type(tree).model_fields}
    assert {flag.path for flag in flags()} == fields
    assert all(flag.help for flag in flags())


def test_without_flags_the_defaults_hold() -> None:
    assert invoke() == Config()


def test_flags_reach_their_settings() -> None:
    config = invoke(
        *("--model", "x", "--ranks", "3", "--kv-memory", "1.5GiB", "--deterministic"),
        *("--no-prefix-cache", "--port", "0", "--control-key", "k", "--commit-timeout", "2.5"),
    )
    assert (config.model.model, config.cluster.ranks, config.server.port) == ("x", 3, 0)
    assert config.engine.kv_memory == 3 * 2**29
    assert (config.engine.deterministic, config.engine.prefix_cache) == (True, False)
    assert config.server.control_key == SecretStr("k")
    assert config.cluster.commit_timeout == 2.5


def test_the_files_of_tls_may_be_named_as_vllm_names_them() -> None:
    server = invoke("--ssl-certfile", "a.crt", "--ssl-keyfile", "a.key").server
    assert (server.tls_cert_file, server.tls_key_file) == (Path("a.crt"), Path("a.key"))


def test_flags_go_before_environment_before_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("cluster: {ranks: 2, max_ranks: 5}\nserver: {port: 1}\n")
    monkeypatch.setenv("FLEXPERT_CLUSTER__RANKS", "3")
    monkeypatch.setenv("FLEXPERT_CLUSTER__MAX_RANKS", "6")
    config = invoke("--config", str(file), "--ranks", "4")
    assert (config.cluster.ranks, config.cluster.max_ranks, config.server.port) == (4, 6, 1)


def test_degraded_answers_and_identical_ones_exclude_each_other() -> None:
    assert invoke("--on-missing-expert", "degrade").cluster.on_missing_expert == "degrade"
    with pytest.raises(ConfigError, match=r"^wrong settings: on_missing_expert=degrade"):
        invoke("--on-missing-expert", "degrade", "--deterministic")


def test_a_complaint_names_the_flag_that_was_given() -> None:
    with pytest.raises(ConfigError, match="--max-running 0: Input should be greater"):
        invoke("--max-running", "0")


NIXL_EP: dict[str, object] = {
    "engine.device": "cuda",
    "engine.all2all": "nixl_ep",
    "cluster.max_ranks": 2,
}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {**NIXL_EP, "engine.transport": "nixl"},
            "transport=nixl is not for all2all=nixl_ep",
        ),
        (
            {**NIXL_EP, "cluster.join_listen": "tcp://127.0.0.1:0"},
            "join_listen is not for all2all=nixl_ep",
        ),
        ({"cluster.ranks": 0}, "say where they may with --join-listen"),
        ({"cluster.ranks": 0, "cluster.launcher": "ray"}, "launcher=ray starts the ranks itself"),
    ],
)
def test_ranks_that_could_never_meet_are_refused(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(environment={}, overrides=wrong)
