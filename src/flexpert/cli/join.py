"""`flexpert join` and `flexpert leave`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from flexpert.cli.client_commands import connect
from flexpert.cli.options import (
    DEFAULT_URL,
    ApiKey,
    CaFile,
    Json,
    Url,
    duration_option,
    make_console,
)
from flexpert.errors import ConfigError

LEAVE_EXAMPLES = (
    "flexpert leave 3",
    "flexpert leave 2 3 --url http://head:8000",
)
JOIN_EXAMPLES = (
    "flexpert join tcp://head:7000 --cluster-token-file cluster.token",
    "FLEXPERT_CLUSTER_TOKEN=… flexpert join tcp://10.0.0.1:7000 --id 3 --model /data/olmoe",
)


def join(
    address: Annotated[
        str, typer.Argument(metavar="tcp://HOST:PORT", help="Where the head waits (--join-listen).")
    ],
    rank: Annotated[
        int | None,
        typer.Option("--id", min=0, max=255, help="Rank id to have; default: a free one."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is here; default: where the head has it.")
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="Name of this machine; ranks with equal names share memory."),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(
            help="Network interfaces of this host to others, as eth1; default: UCX chooses."
        ),
    ] = None,
    cluster_token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file whose first line is the cluster token (mode 600); else "
            "FLEXPERT_CLUSTER_TOKEN."
        ),
    ] = None,
    retry: Annotated[
        float,
        duration_option(
            "--retry", "How long to look for a head that is lost.", least=0, default="5m"
        ),
    ] = 300.0,
    ready_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file that is there while the rank serves."),
    ] = None,
) -> None:
    """Join a service as a rank on this host; Ctrl-C or SIGTERM drains it first.

    The head gives the id and all settings. The model's files must be on this host, too. When the
    head is lost or gives this host up, it joins again under the same id.
    """
    from flexpert.cluster.hosts.cluster_token import HOW, keys_of, read_token

    token = read_token(cluster_token_file)
    if not token:
        raise ConfigError(f"the cluster token is missing; {HOW}")
    if not address.startswith("tcp://"):
        raise ConfigError(f"{address!r} is no address to join; write tcp://HOST:PORT")
    from flexpert.cluster.processes import caches

    caches.keep_private(os.environ)  # before torch is imported
    from flexpert.cluster.hosts.agent import Agent, AgentOptions
    from flexpert.config import EngineConfig
    from flexpert.engine.host_network import check_network

    overrides: dict[str, object] = {}
    if model is not None:
        overrides["model.model"] = model
    if machine is not None:
        overrides["engine.machine"] = machine
    if interface is not None:
        check_network(EngineConfig(interface=interface))
        overrides["engine.interface"] = interface

    async def run() -> int:
        options = AgentOptions(
            address, -1 if rank is None else rank, overrides, retry, ready_file=ready_file
        )
        return await Agent(options, keys_of(token), lambda line: print(line, flush=True)).run()

    raise typer.Exit(asyncio.run(run()))


def leave(
    ids: Annotated[list[int], typer.Argument(metavar="ID...", help="Rank ids that leave.")],
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Drain ranks and let them go; the same as 'flexpert scale --remove'.

    The agent of a rank that joined from outside exits then.
    """
    from flexpert.cli.scale import operation_body, run_scale

    with connect(url, api_key, ca_file) as client:
        body = operation_body(None, 0, ids)
        raise typer.Exit(run_scale(client, body, console=make_console(), as_json=json_))
