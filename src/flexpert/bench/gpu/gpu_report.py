"""The figures of `flexpert bench layer` and `flexpert bench decode` as tables (pure)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.bench.gpu.decode import DecodePoint, DecodeReport
from flexpert.bench.gpu.layer_report import LayerPoint, LayerReport, LayerResult
from flexpert.bench.model_shapes import DECODE_SHAPES
from flexpert.bench.report_table import figures_table, no_figures, with_note
from flexpert.bench.statistics import SpreadUs

_DECODE_COLUMNS = (
    *("ranks", "GPUs", "batch", "experts", "roofline ms", "flexpert ms", "× roofline", "tokens/s"),
)


def layer_text(report: LayerReport) -> RenderableType:
    """A table for each shape and number of tokens, then what was measured on."""
    return with_note(
        [_layer_table(point) for point in report.points],
        "medians of graph replays (of several ranks the slowest's), the L2 flushed and new data "
        "before each; "
        f"roofline: bytes or flops over what this GPU does\n{report.gpu.line()}\n"
        f"{report.machine.line()}",
    )


def _layer_table(point: LayerPoint) -> Table:
    shape = point.shape
    title = (
        f"{shape.name}{', experts in fp8' if point.quantised else ''}: {_tokens(point)}, "
        f"hidden {shape.hidden}, inter {shape.inter}, "
        f"top-{shape.topk} of {shape.experts} experts, {point.active:.0f} of them in use"
        f"{' on a GPU' if point.ranks > 1 else ''}: roofline {point.roofline_us:,.0f} µs"
    )
    table = figures_table(title, "experts by", ("µs", "p90", "× roofline", "× flexpert", "error"))
    for result in point.results:
        table.add_row(*_layer_row(result, point.roofline_us))
    return table


def _tokens(point: LayerPoint) -> str:
    if point.ranks == 1:
        return f"{point.tokens} tokens"
    return f"{point.ranks} ranks on {point.gpus} GPUs with {point.tokens} tokens each"


def _layer_row(result: LayerResult, roofline_us: float) -> list[str | Text]:
    if result.us is None:
        return [result.baseline, no_figures(result.skipped, wrong=result.wrong)]
    return [
        result.baseline,
        _median(result.us, 1.0),
        _number(result.us.p90, 1.0),
        f"{result.us.p50 / roofline_us:.2f}",
        "" if result.times_ours is None else f"{result.times_ours:.2f}",
        f"{result.error or 0:.4f}",
    ]


def decode_text(report: DecodeReport) -> RenderableType:
    """One table, then what was measured on."""
    title = (
        f"a decode step of {DECODE_SHAPES[report.shape].title}'s shapes "
        f"({report.layers} layers, random weights"
        f"{', experts in fp8' if report.quantised else ''}), "
        f"{report.context} tokens in the cache of each sequence"
    )
    table = Table(title=title, title_justify="left", box=None)
    other = () if report.compared == "none" else (f"{report.compared} ms", "× flexpert")
    for column in (*_DECODE_COLUMNS, *other):
        table.add_column(column, justify="right")
    for point in report.points:
        table.add_row(*_decode_row(point)[: len(_DECODE_COLUMNS) + len(other)])
    verdict = "" if report.correct else "  [bold red]WRONG[/]"
    return Group(
        table,
        Text.from_markup(
            f"logits differ from transformers' by {report.error:.4f} (relative){verdict}; model "
            f"built in {report.build_s:.1f} s, {report.captures} graphs captured in "
            f"{report.capture_s:.1f} s\nmedians over {report.steps} steps; roofline: "
            f"weights in use, KV cache and states at the rate of its memory{_compared(report)}\n"
            f"{report.gpu.line()}\n{report.machine.line()}",
            style="dim",
        ),
    )


def _compared(report: DecodeReport) -> str:
    if report.compared == "transformers":
        return "; transformers: DynamicCache, sdpa, grouped_mm"
    if report.compared == "expanded":
        return (
            f"; a token's cache: {report.kv_bytes:,} bytes, expanded to keys and values of all "
            f"heads {report.compared_kv_bytes:,}"
        )
    return ""


def _decode_row(point: DecodePoint) -> list[str | Text]:
    seconds = point.ours_us.p50 / 1e6
    row: list[str | Text] = [
        f"{point.ranks}",
        f"{point.gpus}",
        f"{point.batch}",
        f"{point.active:.1f}",
        f"{point.roofline_ms:.2f}",
        _median(point.ours_us, 1e3),
        f"{point.times_roofline:.2f}",
        f"{point.batch / seconds:,.0f}",
    ]
    if point.compared_us is None or point.times_ours is None:
        return [*row, Text(point.skipped or "", style="yellow"), ""]
    return [*row, _median(point.compared_us, 1e3), f"{point.times_ours:.2f}"]


def _median(spread: SpreadUs, unit: float) -> str:
    return _number(spread.p50, unit)


def _number(value: float, unit: float) -> str:
    shown = value / unit
    return f"{shown:,.{0 if shown >= 1000 else 1 if shown >= 100 else 2}f}"
