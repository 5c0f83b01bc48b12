"""A service and llama.cpp's server, as a table (pure)."""

from __future__ import annotations

from statistics import median

from rich.console import RenderableType

from flexpert.bench.llama.llama_run import LlamaReport
from flexpert.bench.report_table import figures_table, with_note


def llama_text(report: LlamaReport) -> RenderableType:
    """Medians of the turns, and the ratio of pairs with its spread."""
    title = (
        f"{report.model} on {report.ranks} rank(s) and in llama.cpp, {report.threads} thread(s) "
        f"each: {report.prompts}, {report.output_tokens} out"
    )
    columns = ["flexpert, tokens/s", "llama.cpp, tokens/s", "ratio", "lowest", "highest"]
    columns += ["flexpert, MiB", "llama.cpp, MiB"]
    table = figures_table(title, "streams", columns)
    for one in report.streams:
        speeds = [
            median(figures.output_tokens_per_s for figures in side)
            for side in zip(*((pair.ours, pair.theirs) for pair in one.pairs), strict=True)
        ]
        table.add_row(
            str(one.streams),
            *(f"{speed:,.1f}" for speed in speeds),
            f"{one.ratio:.2f}",
            f"{min(one.ratios, default=0):.2f}",
            f"{max(one.ratios, default=0):.2f}",
            *(f"{held / 2**20:,.0f}" for held in (one.memory.ours, one.memory.theirs)),
        )
    found = report.agreement
    note = (
        f"greedy answers of {found.tokens} tokens to {found.prompts} prompts: {found.first} first "
        f"tokens the same and {found.near} apart by rounding, {found.whole} answers the same, "
        f"{found.same_tokens:.1f} tokens on average; memory (PSS) of all processes after the "
        f"requests, llama.cpp with a KV cache of {report.llama_tokens:,} tokens; "
        f"{report.machine.line()}"
    )
    if report.failed:
        note = f"{report.failed} requests failed; {note}"
    return with_note([table], note)
