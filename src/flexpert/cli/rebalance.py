"""`flexpert rebalance`: experts move between the ranks, or what that would do is shown."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.console import Console

from flexpert.cli.client_commands import connect
from flexpert.cli.options import DEFAULT_URL, ApiKey, CaFile, Json, Url, make_console
from flexpert.cluster.views import RebalanceView

REBALANCE_EXAMPLES = (
    "flexpert rebalance --dry-run",
    "flexpert rebalance",
    "flexpert rebalance --dry-run --json | jq '.balance.imbalance_by_layer'",
    "Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 cancelled",
)

_HOTTEST = 5  # experts of the most uneven layer that are shown


def rebalance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the loads, the gain and the moves.")
    ] = False,
    wait: Annotated[bool, typer.Option(help="Follow the change to its end.")] = True,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Move experts between the ranks so that all have the same to do.

    Any other change of the ranks goes before it. With --balance auto the service does it by itself.
    """
    from flexpert.cli.scale import run_scale

    console = make_console()
    with connect(url, api_key, ca_file) as client:
        if dry_run:
            show_proposal(console, client.proposed_rebalance(), as_json=json_)
            return
        body = {"rebalance": True}
        raise typer.Exit(run_scale(client, body, console=console, wait=wait, as_json=json_))


def show_proposal(console: Console, view: RebalanceView, *, as_json: bool) -> None:
    """What a rebalance would do."""
    if as_json:
        text = msgspec.json.encode(view).decode()
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        return
    for line in proposal_lines(view):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def proposal_lines(view: RebalanceView) -> list[str]:
    """For people."""
    balance = view.balance
    age = "" if balance.age_s is None else f", {balance.age_s:.0f} s ago"
    ranks = ", ".join(f"{rank}: {load:.2f}" for rank, load in sorted(balance.rank_loads.items()))
    lines = [
        f"load of the ranks over the mean: {ranks}",
        f"imbalance: {balance.imbalance:.3f} (largest load over the mean, over all layers)",
    ]
    layers = balance.imbalance_by_layer
    if layers and view.expert_loads:
        worst = max(range(len(layers)), key=lambda layer: layers[layer])
        shares = view.expert_loads[worst]
        hottest = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:_HOTTEST]
        named = ", ".join(f"{expert}: {shares[expert]:.1%}" for expert in hottest)
        lines.append(f"least even: MoE layer {worst}, {layers[worst]:.3f}; its experts {named}")
    lines.append(f"--balance {balance.mode}: {balance.verdict}{age}: {balance.reason}")
    if view.moves:
        lines.append(
            f"a rebalance would move {view.moves} experts, which costs about {view.cost_s:.2f} s; "
            f"steps would wait for experts {view.after:.1%} of the time, and not {view.before:.1%}"
        )
    else:
        lines.append("a rebalance would move nothing")
    return lines
