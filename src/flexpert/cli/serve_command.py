"""`flexpert serve`."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from flexpert.cli.command import Command
from flexpert.cli.settings import with_settings
from flexpert.config import Config
from flexpert.vllm_flags import translated

SERVE_EXAMPLES = (
    "flexpert serve --ranks 2",
    "flexpert serve ./olmoe --ranks 4 --kv-memory 2GiB --port 9000",
    "flexpert serve --config flexpert.yaml --deterministic",
    "flexpert serve --state-dir DIR --takeover  # from the head that runs there",
    "Flags of 'vllm serve' are taken for ours, or refused with advice: docs/vllm.md",
)


class ServeCommand(Command):
    """Takes vLLM's flags, too. What Ctrl-C does is the service's own to say."""

    interruptible = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises: ConfigError"""
        ours, remarks = translated(args)
        for remark in remarks:
            print(f"flexpert: {remark}", file=sys.stderr)
        return super().parse_args(ctx, ours)


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
