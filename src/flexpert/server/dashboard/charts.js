// Output and latency of the last minutes, with marks where the ranks changed. Drawn by uPlot.

import { minute } from "./format.js";

const SHOWN_S = 300;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A value with none beside it would not be seen as a line.
function lonely(chart, series, first, last) {
  const values = chart.data[series];
  const found = [];
  for (let at = first; at <= last; at += 1) {
    const alone = (values[at - 1] ?? null) === null && (values[at + 1] ?? null) === null;
    if ((values[at] ?? null) !== null && alone) found.push(at);
  }
  chart.lonely = found;
  return found.length > 0;
}

export class Charts {
  // marks: () → [{time, fault}], in seconds since 1970.
  constructor(marks) {
    this.marks = marks;
    this.history = [];
    this.charts = [];
    this.build();
    document.addEventListener("themechange", () => this.build());
    new ResizeObserver(() => this.resize()).observe(document.querySelector(".charts"));
  }

  build() {
    for (const chart of this.charts) chart.destroy();
    this.charts = [
      this.chart("chart-tokens", (row) => [row[1]], true),
      this.chart("chart-first", (row) => row[2] ?? [null, null], false),
      this.chart("chart-gap", (row) => row[3] ?? [null, null], false),
    ];
    this.show(this.history);
  }

  chart(id, values, filled) {
    const place = document.getElementById(id);
    const [ink, line, accent, band] = ["--muted", "--line", "--accent", "--band"].map(colour);
    const axis = { stroke: ink, font: "11px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { show: false } };
    const series = { stroke: accent, width: 1.75, points: { show: filled ? false : lonely, filter: (chart) => chart.lonely ?? [], size: 4, fill: accent, width: 0 } };
    const options = {
      width: place.clientWidth || 300,
      height: place.clientHeight || 168,
      padding: [6, 22, 0, 0],
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      legend: { show: false },
      scales: { x: { time: true }, y: { range: (_, __, most) => [0, most > 0 ? most * 1.15 : 1] } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 52, incrs: [30, 60, 120, 300],
          values: (_, ticks) => ticks.map((one) => (one % 60 ? "" : minute(one))) },
        { ...axis, size: 46, space: 34, values: (_, ticks) => ticks.map((one) => one.toLocaleString("en-US")) },
      ],
      series: filled
        ? [{}, { ...series, fill: band }]
        : [{}, series, { ...series, stroke: "transparent", points: { show: false } }],
      bands: filled ? [] : [{ series: [2, 1], fill: band }],
      hooks: { drawClear: [(chart) => this.mark(chart)], ready: [(chart) => this.tip(chart, filled)] },
    };
    const chart = new uPlot(options, [[], ...options.series.slice(1).map(() => [])], place);
    chart.values = values;
    return chart;
  }

  mark(chart) {
    const { ctx, bbox } = chart;
    const [plain, fault] = [colour("--p-commit"), colour("--bad")];
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    for (const one of this.marks()) {
      const x = Math.round(chart.valToPos(one.time, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = one.fault ? fault : plain;
      ctx.setLineDash(one.fault ? [] : [3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.beginPath();
      ctx.arc(x, bbox.top, 2.5 * devicePixelRatio, 0, 7);
      ctx.fill();
    }
    ctx.restore();
  }

  tip(chart, filled) {
    const place = chart.root.parentElement;
    const over = chart.over;
    over.addEventListener("mousemove", () => {
      const at = chart.cursor.idx;
      if (at === null || at === undefined) return;
      const [value, tail] = [chart.data[1][at], chart.data[2]?.[at]];
      const shown = value === null || value === undefined ? "nothing" : filled ? `${value} tokens/s` : `median ${value} ms, 95th percentile ${tail} ms`;
      place.title = `${new Date(chart.data[0][at] * 1000).toLocaleTimeString()}: ${shown}`;
    });
  }

  show(history) {
    this.history = history;
    const last = history.length ? history[history.length - 1][0] : Date.now() / 1000;
    const rows = history.filter((row) => row[0] >= last - SHOWN_S);
    const times = rows.map((row) => row[0]);
    for (const chart of this.charts) {
      const values = rows.map(chart.values);
      chart.batch(() => {
        chart.setData([times, ...chart.series.slice(1).map((_, at) => values.map((one) => one[at]))]);
        chart.setScale("x", { min: last - SHOWN_S, max: last });
      });
    }
  }

  resize() {
    for (const chart of this.charts) {
      const place = chart.root.parentElement;
      chart.setSize({ width: place.clientWidth, height: place.clientHeight });
    }
  }
}
