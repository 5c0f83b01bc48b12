// The page at `/`: connects, and shows what comes.

import { Charts } from "./charts.js";
import { ask, key, listen, Refused } from "./connection.js";
import { Controls } from "./controls.js";
import { count, figure, ids } from "./format.js";
import { drawRamp, HeatMap } from "./heatmap.js";
import { RankTable } from "./ranks.js";
import { State } from "./state.js";
import { Timeline } from "./timeline.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const LOADS_MS = 5000; // how often the heat map asks for new loads

const by = (id) => document.getElementById(id);
const write = (id, text) => {
  const place = by(id);
  if (place.textContent !== text) place.textContent = text;
};

const state = new State();
const controls = new Controls(() => connect());
const charts = new Charts(() =>
  state.cluster === null ? [] : state.timeline
    .filter((one) => one.kind === "operation" || one.kind === "fault")
    .map((one) => ({ time: one.time, fault: one.kind === "fault" })));
const table = new RankTable(by("ranks"), showSelection);
const timeline = new Timeline(by("track"), by("operations"), (operation) => controls.cancel(operation));
const heat = new HeatMap(by("heat"), by("heat-frame"), by("heat-cursor"), by("heat-cell"), () => drawRamp(by("ramp")));
let waiting = false; // for the next frame
let shownEpoch = -1;
let layerAsked = 0;

// ---- connection ---------------------------------------------------------------------------------

let connection = null;

async function connect() {
  connection?.abort();
  const mine = (connection = new AbortController());
  for (let tries = 0; !mine.signal.aborted; tries += 1) {
    try {
      await listen("cluster/stream", (name, data) => {
        tries = 0;
        banner("");
        if (state.apply(name, data)) later();
      }, mine.signal);
      banner("The connection has ended; connecting again…");
    } catch (error) {
      if (mine.signal.aborted) return;
      if (error instanceof Refused && error.status === 401) {
        const given = key.get();
        key.forget();
        pill("bad", "locked");
        controls.askKey(given ? "This key is not the right one." : null);
        return;
      }
      banner(error instanceof Refused ? error.message : "The service cannot be reached; trying again…");
      pill("bad", "not connected");
    }
    await new Promise((done) => setTimeout(done, RETRY_MS[Math.min(tries, RETRY_MS.length - 1)]));
  }
}

function banner(text) {
  by("banner").hidden = !text;
  write("banner", text);
}

function pill(kind, text) {
  by("state").dataset.kind = kind;
  const place = by("state").querySelector("span");
  if (place.textContent !== text) place.textContent = text;
}

// ---- what is shown ------------------------------------------------------------------------------

// Events come in bursts; the page is written once a frame.
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    show();
  });
}

function show() {
  const { cluster } = state;
  const ranks = state.sorted;
  const active = ranks.filter((rank) => rank.state === "active");
  const running = state.running;
  document.title = `${cluster.model} – flexpert`;
  write("model", cluster.model);
  write("epoch", `epoch ${cluster.epoch}`);
  by("lock").hidden = !key.get();
  if (cluster.down) pill("bad", "down");
  else if (running) pill("warn", `changing: ${running.phase} ${Math.round(running.progress * 100)} %`);
  else if (!active.length) pill("bad", "no rank is up");
  else pill("good", "serving");
  showNow(cluster, ranks, active);
  charts.show(state.history);
  const most = Math.max(1, ...ranks.map((rank) => rank.running));
  table.show(ranks, most, cluster.balance?.rank_loads);
  timeline.show(state.timeline);
  by("rebalance").hidden = !cluster.balance;
  if (document.activeElement !== by("target") && !by("target").dataset.touched) {
    by("target").value = (running ? running.target : cluster.desired).length || active.length;
  }
  if (cluster.epoch !== shownEpoch) {
    shownEpoch = cluster.epoch;
    showLayers(cluster.placement.layers);
    loadLayer();
  }
}

function showNow(cluster, ranks, active) {
  const now = state.latest;
  const sum = (name) => ranks.reduce((total, rank) => total + rank[name], 0);
  write("now-tokens", now ? figure(now[1]) : "–");
  for (const [name, place] of [["now-first", 2], ["now-gap", 3]]) {
    const times = state.recentTimes(place);
    write(name, figure(times?.[0]));
    write(`${name}-tail`, times ? `p95 ${figure(times[1])} ms` : "no request lately");
  }
  write("now-running", count(sum("running")));
  write("now-waiting", `${count(sum("waiting"))} waiting`);
  write("now-ranks", String(active.length));
  write("now-most", `of at most ${cluster.max_ranks}`);
  const { placement } = cluster;
  const missing = placement.missing_experts ? `, ${count(placement.missing_experts)} missing` : "";
  write("now-experts", `${count(placement.layers)} layers × ${count(placement.experts)} experts${missing}`);
}

function showSelection() {
  const chosen = table.selected.size;
  by("remove").disabled = !chosen;
  write("remove", chosen > 1 ? `Remove ${chosen} selected` : "Remove selected");
}

// ---- the heat map -------------------------------------------------------------------------------

function showLayers(layers) {
  const slider = by("layer");
  slider.max = Math.max(0, layers - 1);
  slider.setAttribute("aria-valuetext", `layer ${slider.value} of ${layers}`);
  write("layer-number", slider.value);
}

async function loadLayer() {
  const asked = (layerAsked += 1);
  try {
    const placement = await ask("GET", `cluster/placement?layer=${by("layer").value}`);
    if (asked !== layerAsked) return; // another was asked for meanwhile
    heat.show(placement);
    by("heat-scale").hidden = !placement.loads;
    const replicas = Object.values(placement.held).reduce((sum, held) => sum + held.length, 0);
    const counted = placement.loads ? "" : " · load is not counted here";
    write("heat-note", `${count(replicas)} replicas of ${count(placement.experts)} experts on ${Object.keys(placement.held).length} ranks${counted}`);
  } catch (error) {
    write("heat-note", error.message);
  }
}

let moving = 0;
by("layer").addEventListener("input", () => {
  showLayers(Number(by("layer").max) + 1);
  clearTimeout(moving);
  moving = setTimeout(loadLayer, 40); // while it is dragged, not for each step
});
setInterval(() => {
  if (state.cluster?.balance && !document.hidden) loadLayer();
}, LOADS_MS);

// ---- changes ------------------------------------------------------------------------------------

const target = by("target");
const step = (by_) => {
  target.dataset.touched = "yes";
  target.value = Math.max(1, Math.min(state.cluster?.max_ranks ?? 1, (Number(target.value) || 0) + by_));
};
target.addEventListener("focus", () => target.select());
target.addEventListener("input", () => { target.dataset.touched = "yes"; });
by("less").addEventListener("click", () => step(-1));
by("more").addEventListener("click", () => step(1));
by("scale").addEventListener("submit", async (event) => {
  event.preventDefault();
  const ranks = Number(target.value);
  await controls.change(`Scale to ${ranks} rank${ranks === 1 ? "" : "s"}`, { ranks });
  delete target.dataset.touched;
});
by("remove").addEventListener("click", async () => {
  const remove = [...table.selected].sort((a, b) => a - b);
  const title = `Remove rank${remove.length === 1 ? "" : "s"} ${ids(remove)}`;
  if (await controls.change(title, { add: 0, remove })) table.clear();
});
by("rebalance").addEventListener("click", () => controls.change("Rebalance the experts", { rebalance: true }));
by("lock").addEventListener("click", () => {
  key.forget();
  location.reload();
});

connect();
