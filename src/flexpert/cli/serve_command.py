"""`flexpert serve`."""

from __future__ import annotations

import os

import typer

from flexpert.cli.settings import with_settings
from flexpert.config import Config

SERVE_EXAMPLES = (
    "flexpert serve --ranks 2",
    "flexpert serve --model ./olmoe --ranks 4 --kv-memory 2GiB --port 9000",
    "flexpert serve --config flexpert.yaml --deterministic",
)


@with_settings
def serve(config: Config) -> None:
    """Serve a model on several ranks, OpenAI-compatible; 'flexpert scale' changes them.

    A setting comes from its flag, else from the environment (FLEXPERT_CLUSTER__RANKS=2), else
    from --config FILE, else from its default.
    """
    from flexpert.cluster.processes import caches

    caches.keep_private(os.environ)  # before torch is imported
    from flexpert.server.service_process import serve as run

    raise typer.Exit(run(config))
