"""`flexpert run-batch`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexpert.cli.options import ApiKey, CaFile, duration_option
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.cli.batch_run import BatchCounts

RUN_BATCH_EXAMPLES = (
    "flexpert run-batch -i in.jsonl -o out.jsonl --url http://127.0.0.1:8000",
    "flexpert run-batch -i in.jsonl -o out.jsonl --url http://127.0.0.1:8000 --resume",
    "flexpert run-batch -i in.jsonl -o out.jsonl ./olmoe -- --ranks 4 --kv-memory 2GiB",
    'A line: {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {...}}',
)


def run_batch(
    source: Annotated[
        Path, typer.Option("-i", "--input-file", metavar="FILE", help="Requests, one a line.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output-file", metavar="FILE", help="Gets an answer a line.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL [-- FLAGS]]",
            help="Serve this model for the time of the batch, with these flags of flexpert serve.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="A service that runs.", show_default=False),
    ] = None,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an output: what it has is not asked again.")
    ] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=4096, help="Requests at a time.")
    ] = 64,
    patience: Annotated[
        float,
        duration_option(
            "--patience",
            "How long to ask again while the service cannot be reached or is too busy",
            least=0.0,
            default="5m",
        ),
    ] = 300.0,
) -> None:
    """Answer a file of requests, OpenAI's batch format; the order of the answers is free.

    Ctrl-C, or whatever ends it, leaves an output that --resume goes on with: no request is
    answered twice in it. An error is an answer, too. Exit status: 0 all are answered, 1 not all.
    """
    if bool(model) == (url is not None):
        raise ConfigError("name a MODEL to serve, or --url of a service that runs")
    if model and model[0].startswith("-"):
        raise ConfigError("name the MODEL before the flags of flexpert serve")
    try:
        asyncio.run(
            _run(source, output, model or [], url, api_key, ca_file, resume, concurrency, patience)
        )
    except KeyboardInterrupt:
        print("flexpert: interrupted; go on with --resume", file=sys.stderr)
        raise typer.Exit(130) from None


async def _run(
    source: Path,
    output: Path,
    model: list[str],
    url: str | None,
    key: str | None,
    ca_file: Path | None,
    resume: bool,
    concurrency: int,
    patience_s: float,
) -> None:
    from flexpert.bench.service import own_service
    from flexpert.cli import batch_run
    from flexpert.cli.client import trusted

    async with AsyncExitStack() as stack:
        written, names = stack.enter_context(batch_run.open_output(output, resume=resume))
        if url is None:
            service = await stack.enter_async_context(own_service(model, key=key))
            url = f"http://{service.target.host}:{service.target.port}"
        verify = trusted(ca_file) if url.startswith("https:") else True
        client = await stack.enter_async_context(
            batch_run.batch_client(url, key, concurrency, verify)
        )
        show = stack.enter_context(_progress())
        counts = await batch_run.run_batch(
            source,
            written,
            names,
            client,
            concurrency=concurrency,
            patience_s=patience_s,
            report=show,
        )
    skipped = f", {counts.skipped} had been before" if counts.skipped else ""
    print(
        f"{counts.done} answered, {counts.failed} of them with an error{skipped}", file=sys.stderr
    )


@contextmanager
def _progress() -> Iterator[Callable[[BatchCounts], None]]:
    """Shows counts, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda counts: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=None)

        def show(counts: BatchCounts) -> None:
            text = f"requests, {counts.failed} failed" if counts.failed else "requests"
            done = counts.skipped + counts.done
            progress.update(task, total=counts.total, completed=done, description=text)

        yield show
