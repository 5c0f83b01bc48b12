"""`flexpert bench serve --compare llama.cpp`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

from flexpert.cli.options import make_console, print_note
from flexpert.display.output import EXIT_FAILURE, show_report
from flexpert.errors import ConfigError

if TYPE_CHECKING:
    from flexpert.bench.offered_load import OfferedLoad
    from flexpert.bench.serve import ServeMeasured

LLAMA: Final = "llama.cpp"


def check_llama_flags(
    compare: str | None,
    only_with: Mapping[str, object],
    never_with: Mapping[str, object],
    concurrency: Sequence[int] | None,
) -> None:
    """
    Args:
        only_with, never_with: values by flag; None and 0 are not given.

    Raises: ConfigError: these do not go together.
    """
    if compare == LLAMA:
        for flag, value in never_with.items():
            if value:
                raise ConfigError(f"--compare {LLAMA} goes with no {flag}")
        return
    for flag, value in only_with.items():
        if value is not None:
            raise ConfigError(f"{flag} is of --compare {LLAMA}")
    if len(concurrency or ()) > 1:
        raise ConfigError(f"several --concurrency can only be measured with --compare {LLAMA}")


def compare_with_llama(
    load: OfferedLoad,
    measured: ServeMeasured,
    program: Path | None,
    *,
    streams: Sequence[int],
    pairs: int,
    requests: int | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure, and show the report.

    Args:
        requests: of a turn; None: as many as suit the streams.

    Raises: FlexpertError, typer.Exit: a request failed.
    """
    from flexpert.bench.llama.llama_report import llama_text
    from flexpert.bench.llama.llama_run import LlamaPlan, run_llama_comparison
    from flexpert.bench.llama.llama_server import check_available

    plan = LlamaPlan(
        load=load,
        measured=measured,
        program=check_available(program),
        streams=streams,
        pairs=pairs,
        requests=requests,
    )
    console = make_console(stderr=True)
    report = run_llama_comparison(plan, lambda line: print_note(line, console))
    show_report(report, llama_text(report), as_json=as_json, output=output)
    if report.failed:
        raise typer.Exit(EXIT_FAILURE)
