// Changes and faults: a track over the last minutes, and a list with phases and pauses.

import { bytes, change, clock, count, seconds } from "./format.js";
import { duration, isRunning } from "./state.js";

const SHOWN_S = 900;
const TRACK_MS = 5000; // how often the track moves on; a pixel is some two seconds
const SIGNALS = { 6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM" };

function element(name, classes, ...children) {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  made.append(...children);
  return made;
}

export class Timeline {
  // onCancel: (operation) → nothing
  constructor(track, list, onCancel) {
    Object.assign(this, { track, list, onCancel });
    this.shown = new Map();
    this.trackDrawn = -TRACK_MS;
  }

  show(entries) {
    let changed = false;
    const wanted = [];
    const seen = new Map();
    for (const entry of entries) {
      const name = entry.kind === "operation" ? entry.operation.id : `${entry.kind} ${entry.time} ${entry.text ?? entry.gone.id}`;
      const said = entry.operation ?? name; // one that has changed is another object
      const before = this.shown.get(name);
      const row = before?.said === said ? before : { said, item: this.item(entry) };
      changed ||= row !== before;
      if (before && before !== row) this.keepFocus(before.item, row.item);
      seen.set(name, row);
      wanted.push(row.item);
    }
    this.shown = seen;
    if (!wanted.length) wanted.push(element("li", "empty", "Nothing has changed yet."));
    for (let at = 0; at < wanted.length; at += 1) {
      if (this.list.children[at] !== wanted[at]) this.list.insertBefore(wanted[at], this.list.children[at] ?? null);
    }
    while (this.list.children.length > wanted.length) this.list.lastChild.remove();
    if (changed || performance.now() - this.trackDrawn >= TRACK_MS) this.drawTrack(entries);
  }

  keepFocus(before, after) {
    if (before.contains(document.activeElement)) {
      queueMicrotask(() => after.querySelector("button")?.focus());
    }
  }

  item(entry) {
    const time = element("time", "", clock(entry.time));
    time.dateTime = new Date(entry.time * 1000).toISOString();
    if (entry.kind === "operation") return this.operation(entry.operation, time);
    if (entry.kind === "fault") {
      const { id, status } = entry.gone;
      const how = status < 0 ? SIGNALS[-status] ?? `signal ${-status}` : `exit status ${status}`;
      return element("li", "", element("div", "line", element("strong", "", `Rank ${id} was lost`), element("span", "tag fault", how), time));
    }
    const tag = { warning: "warning", balance: "balance", autoscale: "autoscaler" }[entry.kind];
    return element("li", "", element("div", "line", element("span", "", entry.text), element("span", `tag ${entry.kind}`, tag), time));
  }

  operation(operation, time) {
    const running = isRunning(operation);
    const tag = running ? `${operation.phase} ${Math.round(operation.progress * 100)} %` : operation.state;
    const line = element("div", "line", element("strong", "", change(operation)), element("span", `tag ${running ? "running" : operation.state}`, tag));
    if (operation.reason) line.append(element("span", "tag", "by itself"));
    line.append(time);
    const phases = element("div", "phases");
    const facts = element("div", "facts");
    const most = duration(operation);
    for (const [name, spent] of Object.entries(operation.phases)) {
      const part = element("i", name);
      part.style.flexGrow = Math.max(spent / Math.max(most, 1e-6), 0.01);
      phases.append(part);
      facts.append(element("span", "", element("i", name), `${name} ${seconds(spent)}`));
    }
    const more = element("div", "facts");
    if (operation.pause_ms !== null && operation.pause_ms !== undefined) more.append(element("span", "", `pause ${operation.pause_ms.toFixed(1)} ms`));
    if (operation.moved_experts) more.append(element("span", "", `${count(operation.moved_experts)} experts loaded`));
    if (operation.moved_requests) {
      const kv = operation.moved_kv_bytes ? `, ${bytes(operation.moved_kv_bytes)} of KV` : "";
      more.append(element("span", "", `${count(operation.moved_requests)} requests moved${kv}`));
    }
    if (operation.error) more.append(element("span", "error", operation.error));
    if (operation.reason) more.append(element("span", "", operation.reason));
    const item = element("li", "", line, phases, facts, more);
    if (running) {
      const button = element("button", "small", "Cancel");
      button.type = "button";
      button.setAttribute("aria-label", `Cancel: ${change(operation)}`);
      button.addEventListener("click", () => this.onCancel(operation));
      line.insertBefore(button, time);
    }
    return item;
  }

  drawTrack(entries) {
    this.trackDrawn = performance.now();
    const now = Date.now() / 1000;
    const place = (time) => `${100 * (1 - (now - time) / SHOWN_S)}%`;
    const parts = [];
    for (let minutes = 15; minutes >= 0; minutes -= 5) {
      const label = element("span", minutes ? "" : "end", minutes ? `−${minutes} min` : "now");
      label.style.left = place(now - 60 * minutes);
      parts.push(label);
    }
    for (const entry of entries) {
      if (now - entry.time > SHOWN_S) continue;
      if (entry.kind === "operation") {
        const bar = element("b", entry.operation.state === "done" && entry.operation.reason ? "automatic" : entry.operation.state);
        bar.style.left = place(entry.time);
        bar.style.width = `${(100 * duration(entry.operation)) / SHOWN_S}%`;
        parts.push(bar);
      } else if (entry.kind === "fault") {
        const mark = element("i", "");
        mark.style.left = place(entry.time);
        parts.push(mark);
      }
    }
    this.track.replaceChildren(...parts);
  }
}
