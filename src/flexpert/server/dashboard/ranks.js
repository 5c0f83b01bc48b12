// The table of ranks: rows are made once, and only what is different is written, of those that are in
// sight: what is written is laid out.

import { bytes } from "./format.js";

export class RankTable {
  // onSelect: told after the selection has become another.
  constructor(body, onSelect) {
    this.body = body;
    this.onSelect = onSelect;
    this.rows = new Map();
    this.selected = new Set();
    this.sight = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const row = this.rows.get(Number(target.dataset.rank));
        if (row?.element !== target) continue;
        row.inSight = isIntersecting;
        if (isIntersecting) this.fill(row);
      }
    }, { root: body.closest(".scroll"), rootMargin: "120px 0px" });
  }

  show(ranks, most, loads) {
    const known = loads && Object.keys(loads).length > 0;
    this.body.closest("table").classList.toggle("no-load", !known);
    const there = new Set(ranks.map((rank) => rank.id));
    for (const [id, row] of this.rows) {
      if (there.has(id)) continue;
      row.element.remove();
      this.sight.unobserve(row.element);
      this.rows.delete(id);
      if (this.selected.delete(id)) this.onSelect();
    }
    ranks.forEach((rank, at) => {
      let row = this.rows.get(rank.id);
      if (!row) {
        row = this.make(rank.id);
        this.rows.set(rank.id, row);
        this.sight.observe(row.element);
      }
      if (this.body.children[at] !== row.element) this.body.insertBefore(row.element, this.body.children[at] ?? null);
      row.latest = { rank, most, load: known ? loads[rank.id] : undefined };
      if (row.inSight) this.fill(row);
    });
  }

  make(id) {
    const element = document.createElement("tr");
    element.dataset.rank = id;
    const cells = {};
    const box = document.createElement("input");
    box.type = "checkbox";
    box.setAttribute("aria-label", `Select rank ${id}`);
    box.addEventListener("change", () => {
      if (box.checked) this.selected.add(id);
      else this.selected.delete(id);
      this.onSelect();
    });
    element.insertCell().append(box);
    for (const name of ["id", "state", "requests", "kv", "load", "experts", "memory", "host", "pid"]) {
      const cell = element.insertCell();
      if (["id", "experts", "memory", "pid"].includes(name)) cell.className = "number";
      if (["host", "pid", "memory"].includes(name)) cell.classList.add("dim");
      if (name === "load") cell.className = "load";
      if (["requests", "kv", "load"].includes(name)) {
        const bar = document.createElement("span");
        bar.className = "bar";
        const text = document.createTextNode("");
        cell.append(bar, text);
        cells[name] = { bar, text };
      } else if (name === "state") {
        const text = document.createElement("span");
        text.className = "status";
        cell.append(text);
        cells[name] = text;
      } else {
        cells[name] = cell;
      }
    }
    return { element, cells, shown: {}, latest: null, inSight: true };
  }

  fill(row) {
    const { cells, shown } = row;
    const { rank, most, load } = row.latest;
    const text = (name, value, write) => {
      if (shown[name] === value) return;
      shown[name] = value;
      write(value);
    };
    text("id", rank.id, (value) => { cells.id.textContent = value; });
    text("state", rank.state, (value) => {
      cells.state.textContent = value;
      cells.state.dataset.state = value;
    });
    const bar = (name, share, label, hot = false) => {
      text(`${name}.share`, Math.round(100 * Math.min(1, share)), (value) => { cells[name].bar.style.backgroundSize = `${value}% 100%`; });
      text(`${name}.text`, label, (value) => { cells[name].text.data = value; });
      text(`${name}.hot`, hot, (value) => cells[name].bar.classList.toggle("hot", value));
    };
    const waiting = rank.waiting ? ` + ${rank.waiting} waiting` : "";
    bar("requests", most ? rank.running / most : 0, `${rank.running}${waiting}`, rank.waiting > 0);
    bar("kv", rank.kv_used, `${Math.round(rank.kv_used * 100)} %`, rank.kv_used > 0.9);
    if (load !== undefined) bar("load", load / 2, `${load.toFixed(2)}×`, load > 1.25);
    text("experts", rank.experts, (value) => { cells.experts.textContent = value; });
    text("memory", bytes(rank.device_memory_bytes || rank.memory_bytes), (value) => { cells.memory.textContent = value; });
    text("host", rank.host, (value) => { cells.host.textContent = value; });
    text("pid", rank.pid || "", (value) => { cells.pid.textContent = value; });
  }

  clear() {
    this.selected.clear();
    for (const row of this.rows.values()) row.element.querySelector("input").checked = false;
    this.onSelect();
  }
}
