"""`flexpert autoscale`: scale a running service by what its clients get."""

from __future__ import annotations

from typing import Annotated

import typer

from flexpert.cli.options import DEFAULT_URL, ApiKey, CaFile, Json, Url, make_console

EXAMPLES = (
    "flexpert autoscale min=1,max=8,ttft_p99=0.5s,itl_p99=50ms",
    "flexpert autoscale max=8,ttft_p99=0.5s --dry-run  # says what it would do",
    "flexpert autoscale max=4 --policy mine.py:decide",
    "flexpert serve --autoscale max=4,ttft_p99=1s      # the same, inside of the service",
)


def autoscale(
    goals: Annotated[
        str,
        typer.Argument(
            metavar="GOALS",
            help="As min=1,max=8,ttft_p99=0.5s,itl_p99=50ms; also kv (share of KV blocks in use), "
            "settle (a smaller number must have sufficed for so long), every (between two looks).",
        ),
    ] = "",
    policy: Annotated[
        str | None,
        typer.Option(metavar="FILE.py[:NAME]", help="A policy of your own: a function."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    looks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="End after so many looks.")
    ] = None,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Change the number of ranks by what clients get, until Ctrl-C.

    Latencies and load are read from GET /metrics and GET /cluster. Up at once, down when fewer
    would have sufficed for a while.
    """
    from flexpert.cli.autoscale_loop import run_autoscale
    from flexpert.cli.client import Client
    from flexpert.cluster.autoscaler import Autoscaler, load_policy, parse_goals

    chosen = load_policy(policy) if policy else None
    with Client(url, api_key, ca_file=ca_file) as client:
        capacity = client.cluster().max_ranks
        parsed = parse_goals(goals, capacity)
        scaler = Autoscaler(parsed, chosen) if chosen else Autoscaler(parsed)
        run_autoscale(client, scaler, make_console(), dry_run=dry_run, looks=looks, as_json=json_)
