"""The figures of `flexpert bench formats` as a table (pure)."""

from __future__ import annotations

from rich.console import RenderableType

from flexpert.bench.formats.format_run import JUDGED_LAYERS, FormatReport
from flexpert.bench.report_table import figures_table, with_note

_COLUMNS = (
    "experts GB",
    "all GB",
    "× memory",
    "p10 ms",
    "p50 ms",
    "× speed",
    "processor ms",
    "× processor",
    "logits differ",
)


def formats_text(report: FormatReport) -> RenderableType:
    """A row for each format, then what was measured on."""
    first = report.points[0]
    table = figures_table(
        f"a decode step of gpt-oss-20b's shapes, {report.layers} of 24 layers and as much of its "
        f"vocabulary ({report.vocabulary:,}), random weights: {report.batch} sequences of "
        f"{report.context} tokens",
        "experts in",
        _COLUMNS,
    )
    for point in report.points:
        table.add_row(
            "bf16" if point.format == "none" else point.format,
            f"{point.expert_bytes / 1e9:.2f}",
            f"{point.all_bytes / 1e9:.2f}",
            f"{point.all_bytes / first.all_bytes:.3f}",
            f"{point.step_us.p10 / 1e3:.2f}",
            f"{point.step_us.p50 / 1e3:.2f}",
            f"{first.step_us.p50 / point.step_us.p50:.2f}",
            f"{point.processor_us.p50 / 1e3:.2f}",
            f"{first.processor_us.p50 / point.processor_us.p50:.2f}",
            f"{point.error:.4f}" + ("" if point.is_correct(report.layers) else " WRONG"),
        )
    judged = ""
    if report.layers > JUDGED_LAYERS:
        judged = f"; logits are judged up to {JUDGED_LAYERS} layers"
    return with_note(
        [table],
        f"{report.steps} steps of each format, in turn; {report.device}, {report.threads} threads "
        f"of torch{judged}\n{report.machine.line()}",
    )
