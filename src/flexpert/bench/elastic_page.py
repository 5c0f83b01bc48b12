"""The result of `flexpert bench elastic` as one HTML file that needs nothing else (pure)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from statistics import median

import msgspec

from flexpert.bench.elastic import ElasticReport
from flexpert.bench.elastic_events import LABELS, ElasticEvent

COLUMNS = (
    *("at", "event", "ranks after", "detect", "agree", "prepare", "commit", "pause"),
    *("longest token gap", "full capacity", "requests moved", "KV moved", "state"),
)


class _PageData(msgspec.Struct):
    """What the script draws. columns of `series`: seconds, tokens/s, first token ms, gap ms."""

    series: list[list[float | None]]
    undisturbed: list[tuple[float, float]]
    baseline: list[float | None]
    events: list[tuple[float, str, str]]


def elastic_page(report: ElasticReport) -> str:
    """The whole file."""
    vendor = resources.files("flexpert.server").joinpath("dashboard", "vendor")
    read = {name: vendor.joinpath(f"uplot.{name}").read_text("utf-8") for name in ("css", "js")}
    licence = vendor.joinpath("uplot.LICENSE").read_text("utf-8")
    # a "<" in the data could end the element that holds it
    data = msgspec.json.encode(page_data(report)).decode().replace("<", "\\u003c")
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>flexpert bench elastic</title>",
            f"<style>{read['css']}{_STYLE}</style></head><body><main>",
            *_head(report),
            *(_chart(name, title) for name, title in _CHARTS),
            *_events_table(report.timeline.events),
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>/*\n{licence}*/\n{read['js']}</script>",
            f"<script>{_SCRIPT}</script>",
            "</main></body></html>\n",
        )
    )


_CHARTS = (
    ("tokens", "Throughput, tokens/s"),
    ("first", "Time to first token, ms (median of those that began)"),
    ("gap", "Inter-token latency, ms (99 of a hundred are below)"),
)


def page_data(report: ElasticReport) -> _PageData:
    """The load over time, and what it was undisturbed."""
    found = report.timeline
    points = found.points
    columns: list[list[float | None]] = [
        [point.tokens_per_s for point in points],
        [point.first_token_ms for point in points],
        [point.inter_token_ms for point in points],
    ]
    begin, end = found.undisturbed[0] if found.undisturbed else (0.0, 0.0)
    quiet = [begin <= point.at_s and point.at_s + found.step_s <= end for point in points]
    baseline = [_median([v for v, q in zip(c, quiet, strict=True) if q]) for c in columns]
    return _PageData(
        series=[[point.at_s for point in points], *columns],
        undisturbed=found.undisturbed,
        baseline=baseline,
        events=[(event.at_s, event.label, _mark(event)) for event in found.events],
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _mark(event: ElasticEvent) -> str:
    return f"{event.label} → {event.ranks}" if event.label in ("up", "down") else event.label


def _head(report: ElasticReport) -> list[str]:
    altered = "not compared" if report.altered is None else f"{report.altered:,}"
    figures = (
        ("answers", f"{report.answers:,}"),
        ("lost", f"{len(report.lost):,}"),
        ("altered", altered),
        ("events", f"{len(report.timeline.events):,}"),
        *(
            (f"undisturbed on {steady.ranks}", f"{steady.tokens_per_s:,.0f} tokens/s")
            for steady in report.steady[:2]
        ),
    )
    tiles = "".join(
        f"<div><span>{_text(name)}</span><b>{_text(value)}</b></div>" for name, value in figures
    )
    about = f"{report.clients} streaming clients; {' '.join(report.flags)}; {report.machine.line()}"
    marks = "".join(
        f'<span><i class="{label}"></i>{_text(label)}: {_text(meaning)}</span>'
        for label, meaning in LABELS.items()
        if any(event.label == label for event in report.timeline.events)
    )
    return [
        "<h1>flexpert bench elastic</h1>",
        f'<p class="muted">{_text(about)}</p>',
        f'<div class="tiles">{tiles}</div>',
        '<p class="marks"><span><i class="quiet"></i>undisturbed</span>'
        f'<span><i class="base"></i>its median</span>{marks}</p>',
    ]


def _chart(name: str, title: str) -> str:
    return f'<h2>{_text(title)}</h2><div class="chart" id="{name}"></div>'


def _events_table(events: Sequence[ElasticEvent]) -> list[str]:
    heads = "".join(f"<th>{_text(name)}</th>" for name in COLUMNS)
    rows = [
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in event_cells(event)) + "</tr>"
        for event in events
    ]
    return [
        "<h2>Events</h2>",
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>',
        *rows,
        "</tbody></table></div>",
    ]


def event_cells(event: ElasticEvent) -> list[str]:
    """As in `COLUMNS`."""
    return [
        f"{event.at_s:.1f} s",
        event.label,
        str(event.ranks),
        _time(event.detect_s),
        _time(event.agree_s),
        _time(event.prepare_s),
        _time(event.commit_s),
        _time(None if event.pause_ms is None else event.pause_ms / 1e3),
        _time(event.longest_gap_s),
        _time(event.full_s),
        f"{event.moved_requests:,}",
        f"{event.moved_bytes / 2**20:,.1f} MiB",
        event.state,
    ]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _text(text: str) -> str:
    return html.escape(text)


_STYLE = """
:root { color-scheme: light dark; --page: #f4f5f8; --card: #fff; --ink: #151821; --muted: #5a6272;
  --line: #dfe3ea; --accent: #3a56d4; --quiet: #3a56d41f; --up: #1a7f4b; --down: #8a3ab9;
  --swap: #0c8599; --rebalance: #a15c00; --kill: #c02636; --stop: #e8590c;
  font: 14px/1.45 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1015; --card: #151a21; --ink: #e8ebf1;
  --muted: #9aa4b5; --line: #2a323e; --accent: #8ba2ff; --quiet: #8ba2ff2b; --up: #4cc38a;
  --down: #c792ea; --swap: #3bc9db; --rebalance: #e9a23b; --kill: #ff7b86; --stop: #ffa94d; } }
body { margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 16px 24px 40px; }
h1 { font-size: 20px; margin: 8px 0 2px; } h2 { font-size: 14px; margin: 20px 0 6px; }
.muted { color: var(--muted); margin: 0 0 12px; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 14px; }
.tiles span { display: block; color: var(--muted); } .tiles b { font-size: 18px; }
.marks { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--muted); }
.marks i { display: inline-block; width: 14px; height: 10px; margin-right: 6px; }
.quiet { background: var(--quiet); } .base { border-top: 2px dashed var(--muted); }
.up { background: var(--up); } .down { background: var(--down); } .swap { background: var(--swap); }
.rebalance { background: var(--rebalance); } .kill { background: var(--kill); }
.stop { background: var(--stop); }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 8px; height: 240px;
  overflow: hidden; }
.wide { overflow-x: auto; } .u-legend { color: var(--muted); font-size: 12px; }
table:not(.u-legend) { border-collapse: collapse; background: var(--card); font-size: 13px; }
.wide th, .wide td { border: 1px solid var(--line); padding: 4px 9px; text-align: right;
  white-space: nowrap; }
.wide th { color: var(--muted); font-weight: 500; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let charts = [];
function mark(chart, base) {
  const { ctx, bbox } = chart, top = bbox.top, end = bbox.top + bbox.height;
  const x = (at) => Math.round(chart.valToPos(at, "x", true));
  const left = bbox.left, right = bbox.left + bbox.width;
  ctx.save();
  ctx.beginPath(); ctx.rect(left, top, bbox.width, bbox.height); ctx.clip();
  ctx.fillStyle = colour("--quiet");
  for (const [from, to] of data.undisturbed) ctx.fillRect(x(from), top, x(to) - x(from), end - top);
  ctx.lineWidth = devicePixelRatio;
  if (base !== null) {
    const y = Math.round(chart.valToPos(base, "y", true));
    ctx.strokeStyle = colour("--muted");
    ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(right, y); ctx.stroke(); ctx.setLineDash([]);
  }
  ctx.textAlign = "left";
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  let free = -1;
  for (const [at, label, text] of data.events) {
    const place = x(at);
    if (place < left || place > right) continue;
    ctx.strokeStyle = ctx.fillStyle = colour("--" + label);
    ctx.beginPath(); ctx.moveTo(place, top); ctx.lineTo(place, end); ctx.stroke();
    if (place > free) {
      ctx.fillText(text, place + 3 * devicePixelRatio, top + 12 * devicePixelRatio);
      free = place + ctx.measureText(text).width + 8 * devicePixelRatio;
    }
  }
  ctx.restore();
}
function draw() {
  for (const chart of charts) chart.destroy();
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 } };
  charts = ["tokens", "first", "gap"].map((name, place) => {
    const box = document.getElementById(name);
    const options = {
      width: box.clientWidth, height: 205, cursor: { sync: { key: "time" } },
      scales: { x: { time: false }, y: { range: (_, __, most) => [0, (most || 1) * 1.2] } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((one) => one + " s") },
        { ...axis, size: 60 },
      ],
      series: [{ label: "s" }, { label: name === "tokens" ? "tokens/s" : "ms", width: 1.5,
        stroke: colour("--accent"), points: { show: name !== "tokens", size: 4 },
        value: (_, one) => one === null ? "–" : one.toFixed(1) }],
      hooks: { draw: [(chart) => mark(chart, data.baseline[place])] },
    };
    return new uPlot(options, [data.series[0], data.series[place + 1]], box);
  });
}
draw();
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""
