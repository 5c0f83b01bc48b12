// Experts of one layer by rank, on a canvas: a filled cell is a replica, its colour the load it has.

const LABEL = 34; // pixels left of the cells
const TOP = 22; // above them: numbers of experts, and a dot where an expert has several replicas

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function rgb(hex) {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

// 0: idle, 1: the mean, 2 and more: hot.
export function ramp(stops, load) {
  const at = Math.min(Math.max(load / 2, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const part = at - low;
  return `rgb(${stops[low].map((one, place) => Math.round(one + (stops[low + 1][place] - one) * part)).join(",")})`;
}

export class HeatMap {
  // frame: what the map has room in. outline: lies over the cell that is pointed at.
  constructor(canvas, frame, outline, cellText, onShown) {
    Object.assign(this, { canvas, frame, outline, cellText, onShown });
    this.placement = null;
    this.cursor = null;
    document.addEventListener("themechange", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(frame);
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.move(null));
    canvas.addEventListener("keydown", (event) => this.press(event));
  }

  // placement: as GET cluster/placement answers.
  show(placement) {
    this.placement = placement;
    this.ranks = Object.keys(placement.held).map(Number).sort((a, b) => a - b);
    this.copies = new Array(placement.experts).fill(0);
    this.rows = this.ranks.map((rank) => new Set(placement.held[rank]));
    for (const row of this.rows) for (const expert of row) this.copies[expert] += 1;
    if (this.cursor && (this.cursor.row >= this.ranks.length || this.cursor.expert >= placement.experts)) this.cursor = null;
    this.draw();
  }

  draw() {
    if (!this.placement || !this.ranks.length) return;
    const { experts } = this.placement;
    const style = getComputedStyle(this.frame);
    const space = this.frame.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - LABEL;
    this.wide = Math.max(4, Math.min(88, Math.floor(space / experts)));
    this.high = Math.max(9, Math.min(22, Math.floor(420 / this.ranks.length)));
    const width = LABEL + this.wide * experts;
    const height = TOP + this.high * this.ranks.length;
    const scale = devicePixelRatio;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const stops = ["--h0", "--h1", "--h2", "--h3"].map((name) => rgb(colour(name)));
    const replicas = this.copies.reduce((sum, one) => sum + one, 0);
    const loads = this.placement.loads;
    const colours = this.copies.map((copies, expert) =>
      ramp(stops, loads ? (loads[expert] * replicas) / Math.max(1, copies) : 1.1));
    const gap = this.wide > 6 ? 2 : 1;
    const [muted, soft, warm, bad] = ["--muted", "--soft", "--p-commit", "--bad"].map(colour);
    context.fillStyle = soft;
    this.rows.forEach((_, row) => context.fillRect(LABEL, TOP + row * this.high, width - LABEL - gap, this.high - 1));
    this.rows.forEach((held, row) => {
      for (const expert of held) {
        context.fillStyle = colours[expert];
        context.fillRect(LABEL + expert * this.wide, TOP + row * this.high, this.wide - gap, this.high - 1);
      }
    });
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = muted;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = Math.max(1, Math.ceil(13 / this.high));
    this.ranks.forEach((rank, row) => {
      if (row % step === 0) context.fillText(String(rank), LABEL - 9, TOP + (row + 0.5) * this.high);
    });
    context.textAlign = "left";
    const every = [1, 2, 4, 8, 16, 32, 64, 128].find((one) => one * this.wide >= 30) ?? 256;
    for (let expert = 0; expert < experts; expert += every) context.fillText(String(expert), LABEL + expert * this.wide, 6);
    this.copies.forEach((copies, expert) => {
      if (copies === 1) return;
      context.fillStyle = copies ? warm : bad;
      context.fillRect(LABEL + expert * this.wide, TOP - 6, this.wide - gap, 3);
    });
    this.placeOutline();
    this.onShown(this);
  }

  // The map is not drawn again when the pointer moves.
  placeOutline() {
    this.outline.hidden = !this.cursor;
    if (!this.cursor) return;
    const { row, expert } = this.cursor;
    const { style } = this.outline;
    style.width = `${this.wide + 2}px`;
    style.height = `${this.high + 3}px`;
    style.transform = `translate(${LABEL + expert * this.wide - 2}px, ${TOP + row * this.high - 2}px)`;
  }

  point(event) {
    const expert = Math.floor((event.offsetX - LABEL) / this.wide);
    const row = Math.floor((event.offsetY - TOP) / this.high);
    const inside = this.placement && expert >= 0 && expert < this.placement.experts && row >= 0 && row < this.ranks.length;
    this.move(inside ? { row, expert } : null);
  }

  press(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e9], End: [0, 1e9] };
    const step = steps[event.key];
    if (!step || !this.placement) return;
    event.preventDefault();
    const now = this.cursor ?? { row: 0, expert: 0 };
    const within = (value, most) => Math.min(Math.max(value, 0), most - 1);
    this.move({
      row: within(now.row + (this.cursor ? step[0] : 0), this.ranks.length),
      expert: within(now.expert + (this.cursor ? step[1] : 0), this.placement.experts),
    });
  }

  move(cursor) {
    if (cursor?.row === this.cursor?.row && cursor?.expert === this.cursor?.expert) return;
    this.cursor = cursor;
    this.placeOutline();
    if (!cursor) return;
    const { row, expert } = cursor;
    const copies = this.copies[expert];
    const held = this.rows[row].has(expert) ? "holds" : "does not hold";
    const many = `${copies} replica${copies === 1 ? "" : "s"}`;
    const loads = this.placement.loads;
    const load = loads ? `, chosen ${(loads[expert] * this.placement.experts).toFixed(2)} times as often as the mean` : "";
    this.cellText.textContent = `Rank ${this.ranks[row]} ${held} expert ${expert} (${many}${load})`;
  }
}

export function drawRamp(canvas) {
  const context = canvas.getContext("2d");
  const stops = ["--h0", "--h1", "--h2", "--h3"].map((name) => rgb(colour(name)));
  for (let x = 0; x < canvas.width; x += 1) {
    context.fillStyle = ramp(stops, (2 * x) / canvas.width);
    context.fillRect(x, 0, 1, canvas.height);
  }
}
