// What the page knows of the service, from the events of `cluster/stream` (pure).

const MOST_HISTORY = 900;
const MOST_KEPT = 96;
const RECENT_S = 15;
const RUNNING = new Set(["preparing", "committing"]);
const OVER = new Set(["done", "failed", "cancelled"]);

export class State {
  constructor() {
    this.cluster = null;
    this.ranks = new Map();
    this.operations = new Map();
    this.events = [];
    this.history = [];
  }

  // name, data: of one event. Returns whether there is anything to show.
  apply(name, data) {
    if (name === "snapshot") {
      const { ranks, ...cluster } = data.cluster;
      this.cluster = cluster;
      this.ranks = new Map(ranks.map((rank) => [rank.id, rank]));
      this.operations = new Map(data.operations.map((one) => [one.id, one]));
      this.events = data.events;
      this.history = data.history;
    } else if (this.cluster === null) {
      return false;
    } else if (name === "change") {
      Object.assign(this.cluster, data.cluster);
      for (const rank of data.ranks) {
        this.ranks.set(rank.id, { ...this.ranks.get(rank.id), ...rank });
      }
      for (const id of data.left) this.ranks.delete(id);
      if (data.figures) this.history.push(data.figures);
      if (this.history.length > MOST_HISTORY) this.history.shift();
    } else if (name === "operation") {
      this.operations.set(data.data.id, data.data);
      if (this.operations.size > MOST_KEPT) this.operations.delete(this.operations.keys().next().value);
    } else {
      this.events.push(data);
      if (this.events.length > MOST_KEPT) this.events.shift();
    }
    // the view may be older than what was told of its operation meanwhile
    const shown = name === "snapshot" || name === "change" ? data.cluster.operation : null;
    if (shown && !OVER.has(this.operations.get(shown.id)?.state)) this.operations.set(shown.id, shown);
    return true;
  }

  get sorted() {
    return [...this.ranks.values()].sort((a, b) => a.id - b.id);
  }

  get latest() {
    return this.history[this.history.length - 1] ?? null;
  }

  // [median, 95th percentile] of the last seconds in which there was one. place: of it in a row.
  recentTimes(place) {
    for (let at = this.history.length - 1; at >= 0; at -= 1) {
      if (this.history[at][0] < this.latest[0] - RECENT_S) break;
      if (this.history[at][place]) return this.history[at][place];
    }
    return null;
  }

  get running() {
    for (const one of this.operations.values()) if (RUNNING.has(one.state)) return one;
    return null;
  }

  // Changes, ranks that were lost and warnings, the latest first.
  get timeline() {
    const found = [...this.operations.values()].map((one) => ({ kind: "operation", time: one.created, operation: one }));
    for (const gone of this.cluster.gone) {
      if (!gone.asked) found.push({ kind: "fault", time: gone.time, gone });
    }
    for (const event of this.events) {
      if (event.kind === "warning") found.push({ kind: "warning", time: event.time, text: event.data.error });
      if (event.kind === "balance") found.push({ kind: "balance", time: event.time, text: event.data.reason });
      if (event.kind === "autoscale") found.push({ kind: "autoscale", time: event.time, text: event.data.why });
    }
    return found.sort((a, b) => b.time - a.time).slice(0, MOST_KEPT);
  }
}

export const duration = (operation) => Object.values(operation.phases).reduce((sum, one) => sum + one, 0);
export const isRunning = (operation) => RUNNING.has(operation.state);
