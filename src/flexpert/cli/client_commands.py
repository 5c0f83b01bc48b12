"""Commands that talk to a running service: scale, status, chat and complete."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexpert.cli.options import DEFAULT_URL, ApiKey, CaFile, Json, Url, make_console
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.cli.client import Client

MaxTokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, metavar="T", help="Sampling temperature; 0: always the likeliest token."),
]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Sample only from the likeliest tokens of this total share."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")]

SCALE_EXAMPLES = (
    "flexpert scale 4",
    "flexpert scale --add 1",
    "flexpert scale --remove 1 3",
    "flexpert scale --add 1 --remove 1   # a newcomer takes over",
    "flexpert scale 4 --dry-run          # what would move",
    "flexpert scale --cancel op-1a2b3c4d",
    "Exit status: 0 done, 1 failed or refused, 2 wrong usage, 3 cancelled",
)


def scale(
    ranks: Annotated[
        int | None, typer.Argument(min=1, metavar="[RANKS]", help="How many ranks there shall be.")
    ] = None,
    add: Annotated[int, typer.Option(min=0, metavar="N", help="How many ranks join.")] = 0,
    remove: Annotated[
        list[int] | None, typer.Option(metavar="ID...", help="Ids of the ranks that leave.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the change to its end.")] = True,
    cancel: Annotated[
        str | None, typer.Option(metavar="ID", help="Undo a change that is being prepared.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would move; nothing begins.")
    ] = False,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Change the ranks while they serve, and show how it goes.

    Repeating the command while the change runs follows the same change.
    """
    from flexpert.cli.scale import operation_body, print_operation, print_preview, run_scale

    console = make_console()
    if cancel is not None:
        if ranks is not None or add or remove or dry_run:
            raise ConfigError("--cancel stands alone")
        with connect(url, api_key, ca_file) as client:
            print_operation(console, client.cancel(cancel), as_json=json_)
        return
    body = operation_body(ranks, add, remove or [])
    with connect(url, api_key, ca_file) as client:
        if dry_run:
            print_preview(console, client.preview(body), as_json=json_)
            return
        raise typer.Exit(run_scale(client, body, console=console, wait=wait, as_json=json_))


STATUS_EXAMPLES = (
    "flexpert status",
    "flexpert status --watch",
    "flexpert status --json",
)


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again every second.")
    ] = False,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Show the ranks, where the experts are, and the change that runs."""
    from flexpert.cli.status import run_status

    with connect(url, api_key, ca_file) as client:
        run_status(client, console=make_console(), watch=watch, as_json=json_)


TOP_EXAMPLES = (
    "flexpert top",
    "flexpert top --url http://head:8000",
    "flexpert top --once --json",
)


def top(
    once: Annotated[bool, typer.Option("--once", help="Show it once, as it is now.")] = False,
    json_: Json = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Watch ranks, throughput, latency and changes, live; Ctrl-C ends it.

    A browser shows more of it at the service's address.
    """
    from flexpert.cli.top import run_top

    with connect(url, api_key, ca_file) as client:
        run_top(client, console=make_console(), once=once, as_json=json_)


CHAT_EXAMPLES = (
    "flexpert chat",
    'flexpert chat "Who was Noah?"',
    "echo 'Who was Noah?' | flexpert chat --temperature 0",
)


def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Talk to the model; Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    from flexpert.cli.talk import run_chat

    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().strip()
    if message == "":
        raise ConfigError("the message is empty")
    params = _given(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with connect(url, api_key, ca_file) as client:
        run_chat(client, message, system, params, ask=input, out=sys.stdout)


COMPLETE_EXAMPLES = (
    'flexpert complete "In the beginning"',
    'flexpert complete "In the beginning" --max-tokens 200 --temperature 0.8 --seed 7',
    "cat prompt.txt | flexpert complete -",
    'flexpert complete "A user of the shop:" --json-schema user.json',
)


def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Do not stop where the model would.")
    ] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", metavar="FILE", help="The answer is JSON of this schema."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
) -> None:
    """Continue a text."""
    from flexpert.cli.talk import run_complete

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt:
        raise ConfigError("the prompt is empty")
    params = _given(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
        ignore_eos=ignore_eos or None,
        structured_outputs=None if json_schema is None else {"json": read_schema(json_schema)},
    )
    with connect(url, api_key, ca_file) as client:
        run_complete(client, prompt, params, sys.stdout)


def read_schema(path: Path) -> dict[str, Any]:
    """Raises: ConfigError: there is no JSON object in that file."""
    import json

    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema {path}: {error}") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"--json-schema {path}: a JSON Schema is an object")
    return schema


def connect(url: str, key: str | None, ca_file: Path | None = None) -> Client:
    from flexpert.cli.client import Client

    return Client(url, key, ca_file=ca_file)


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
