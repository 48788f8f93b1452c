// The live page. Pictures come over one WebSocket as: u32 length of a JSON text, the JSON, a JPEG.
// What is drawn is always the newest picture, and what is not live is covered: a frozen picture never looks live.
"use strict";

const SILENT_MS = 1000;
const TILES = { fused: "fused", ir: "infrared", vis: "visible" };
const MODES = { fused: "fused", held: "held infrared", ir_only: "infrared only", vis_only: "visible only", stub: "no picture" };
const STAGE_COLORS = ["#6c7bd9", "#4cb8ff", "#35d399", "#c6d64b", "#f6b93f", "#ff8a4c", "#e56ad0", "#8390a5"];
const element = (id) => document.getElementById(id);

const streams = {};
for (const [stream, name] of Object.entries(TILES)) {
  const canvas = element(name);
  streams[stream] = {
    canvas, context: canvas.getContext("2d", { alpha: false }), tile: canvas.closest(".tile"),
    busy: false, waiting: null, drawnAt: -Infinity, session: "", sequence: -1, times: [],
  };
}
let socket = null;
let socketOpen = false;
let publisherLive = false;
let problem = null; // why the rig does not take the viewer's keys
let clockOffsetMs = null; // server UTC minus ours, from the quickest answer
let quickestMs = Infinity;
let trace = []; // [page time, latency] of drawn fused pictures

// -- the connection ---------------------------------------------------------------------------------------------

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/ws`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    socketOpen = true;
    quickestMs = Infinity;
    // While the page loads answers are slow, and half of a slow trip is the clock's error: ask often at first.
    for (let i = 0; i < 10; i++) setTimeout(ping, i * 100);
  };
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : receive(data));
  socket.onclose = () => {
    socketOpen = publisherLive = false;
    for (const state of Object.values(streams)) state.waiting = null;
    refresh();
    setTimeout(connect, 1000);
  };
}

function say(what) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(what));
}

function ping() {
  say({ ping: performance.timeOrigin + performance.now() });
}

function utcMs() {
  return performance.timeOrigin + performance.now() + (clockOffsetMs ?? 0);
}

function hear(fact) {
  if (fact.type === "pong") {
    const now = performance.timeOrigin + performance.now();
    const tripMs = now - fact.ping;
    if (tripMs <= quickestMs) {
      quickestMs = tripMs;
      clockOffsetMs = fact.utc_ms - (fact.ping + now) / 2;
    }
    quickestMs += 0.05; // an old answer loses weight: clocks drift
  } else if (fact.type === "state") {
    publisherLive = fact.publisher;
    problem = fact.problem;
    element("rig").textContent = fact.rig ?? "";
    refresh();
  } else if (fact.type === "event") {
    showEvent(fact);
  } else if (fact.type === "health") {
    publisherLive = true;
  }
}

// -- pictures ---------------------------------------------------------------------------------------------------

function receive(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const facts = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const state = streams[facts.stream];
  const work = { facts, jpeg: new Blob([new Uint8Array(buffer, 4 + length)], { type: "image/jpeg" }) };
  if (state.busy) {
    if (state.waiting) say({ ack: facts.stream }); // replaced before it was decoded
    state.waiting = work;
  } else {
    draw(state, work);
  }
}

async function draw(state, work) {
  state.busy = true;
  try {
    const picture = await createImageBitmap(work.jpeg);
    const { facts } = work;
    if (facts.session !== state.session || facts.sequence > state.sequence) {
      const { canvas } = state;
      if (canvas.width !== picture.width || canvas.height !== picture.height) {
        canvas.width = picture.width;
        canvas.height = picture.height;
        canvas.style.aspectRatio = `${picture.width} / ${picture.height}`;
      }
      state.context.drawImage(picture, 0, 0);
      state.session = facts.session;
      state.sequence = facts.sequence;
      state.drawnAt = performance.now();
      state.facts = facts;
      state.times.push(state.drawnAt);
      state.latencyMs = utcMs() - facts.captured_ms;
      if (facts.stream === "fused") trace.push([state.drawnAt, state.latencyMs]);
    }
    picture.close();
  } catch (error) {
    console.warn("a picture could not be shown", error);
  } finally {
    say({ ack: work.facts.stream });
    state.busy = false;
    if (state.waiting) {
      const next = state.waiting;
      state.waiting = null;
      draw(state, next);
    }
  }
}

// -- figures ----------------------------------------------------------------------------------------------------

function rate(state, now) {
  state.times = state.times.filter((time) => now - time <= 2000);
  const count = state.times.length;
  return count > 1 ? ((count - 1) * 1000) / (state.times[count - 1] - state.times[0]) : 0;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1];
}

function refresh() {
  const now = performance.now();
  for (const state of Object.values(streams)) refreshTile(state, now);
  const fused = streams.fused;
  const live = now - fused.drawnAt <= SILENT_MS;
  document.body.dataset.signal = live ? "live" : "none";

  const mode = live ? fused.facts.mode : "none";
  const badge = element("mode");
  if (badge.dataset.mode !== mode) {
    badge.dataset.mode = mode;
    badge.textContent = live ? MODES[mode] ?? mode : "no signal";
  }
  const recent = trace.filter(([time]) => now - time <= 1000).map(([, latency]) => latency);
  element("latency").textContent = live && recent.length ? Math.max(0, median(recent)).toFixed(0) : "–";
  element("fps").textContent = live ? rate(fused, now).toFixed(1) : "–";

  const connection = element("connection");
  const state = !socketOpen ? "closed" : publisherLive || live ? "live" : "silent";
  connection.dataset.state = state;
  connection.textContent = { closed: "viewer is gone", live: "connected", silent: problem ? "keys refused" : "rig is silent" }[state];

  trace = trace.filter(([time]) => now - time <= 10000);
  drawTrace(now);
  showStages(live ? fused.facts.stages_ms : {});
  for (const camera of ["infrared", "visible"]) {
    showBars(camera, live ? fused.facts.degradation[camera] : null);
    const strength = live ? fused.facts.degradation_strength[camera] : undefined;
    element(`strength-${camera}`).textContent = strength === undefined ? "" : `strength ${Math.round(strength * 100)} %`;
  }
  showFacts(live ? fused.facts : null);
}

function refreshTile(state, now) {
  const silentMs = now - state.drawnAt;
  const live = silentMs <= SILENT_MS;
  state.tile.classList.toggle("live", live);
  state.tile.classList.toggle("uncertain", live && state.facts.mode !== "fused");
  const { canvas } = state;
  state.tile.querySelector(".note").textContent = live
    ? `${canvas.width} × ${canvas.height}, ${rate(state, now).toFixed(0)} fps` : "";
  state.tile.querySelector(".veil span").textContent = !socketOpen
    ? "the viewer's server is gone, trying again"
    : problem ?? (Number.isFinite(silentMs) ? `last picture ${(silentMs / 1000).toFixed(0)} s ago` : "waiting for the first picture");
}

function drawTrace(now) {
  const canvas = element("trace");
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const highest = Math.max(50, ...trace.map(([, latency]) => latency)) * 1.2;
  const right = width - 48;
  const x = (time) => right * (1 - (now - time) / 10000);
  const y = (latency) => height - 1 - (Math.max(0, latency) / highest) * (height - 2);
  const stepMs = [25, 50, 100, 250, 500, 1000, 5000].find((step) => highest / step <= 3) ?? 20000;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  for (let mark = 0; mark < highest * 0.95; mark += stepMs) {
    context.strokeStyle = "#1e2531";
    context.beginPath();
    context.moveTo(0, y(mark));
    context.lineTo(right, y(mark));
    context.stroke();
    context.fillStyle = "#8390a5";
    if (mark) context.fillText(`${mark} ms`, right + 7, y(mark));
  }
  if (trace.length < 2) return;
  context.beginPath();
  trace.forEach(([time, latency], i) => (i ? context.lineTo(x(time), y(latency)) : context.moveTo(x(time), y(latency))));
  context.strokeStyle = "#f4f7fb";
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(x(trace[trace.length - 1][0]), y(0));
  context.lineTo(x(trace[0][0]), y(0));
  context.fillStyle = "#4cb8ff1f";
  context.fill();
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function showStages(stages) {
  const entries = Object.entries(stages).filter(([name]) => name !== "total");
  const total = entries.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  element("stages").replaceChildren(...entries.map(([name, ms], i) => {
    const part = make("span");
    part.style.flexGrow = ms / total;
    part.style.background = STAGE_COLORS[i % STAGE_COLORS.length];
    part.title = `${name} ${ms.toFixed(1)} ms`;
    return part;
  }));
  element("legend").replaceChildren(...entries.map(([name, ms], i) => {
    const item = make("li");
    const swatch = make("span");
    swatch.style.background = STAGE_COLORS[i % STAGE_COLORS.length];
    item.append(swatch, name.replaceAll("_", " "), make("b", "", ms.toFixed(1)));
    return item;
  }));
}

function showBars(camera, kinds) {
  const box = element(`degradation-${camera}`);
  if (!kinds || !Object.keys(kinds).length) {
    if (!box.querySelector(".empty")) box.replaceChildren(make("span", "empty", "no picture to judge"));
    return;
  }
  for (const stray of box.querySelectorAll(":scope > :not(.bar)")) stray.remove();
  for (const bar of box.querySelectorAll(".bar")) if (!(bar.dataset.kind in kinds)) bar.remove();
  const strongest = Object.entries(kinds).reduce((a, b) => (b[1] > a[1] ? b : a))[0];
  for (const [kind, share] of Object.entries(kinds)) {
    let bar = box.querySelector(`[data-kind="${CSS.escape(kind)}"]`);
    if (!bar) {
      bar = make("div", "bar");
      bar.dataset.kind = kind;
      const track = make("div", "track");
      track.append(make("div", "fill"));
      bar.append(make("span", "", kind === "none" ? "clear" : kind.replaceAll("_", " ")), track, make("b"));
      box.append(bar);
    }
    const percent = Math.round(share * 100);
    bar.classList.toggle("strong", kind === strongest);
    bar.querySelector(".fill").style.width = `${percent}%`;
    bar.querySelector("b").textContent = `${percent} %`;
  }
}

function showFacts(facts) {
  const rows = [];
  if (facts) {
    element("rig").textContent = facts.rig;
    const age = (ms) => (ms === null ? "absent" : `${ms.toFixed(0)} ms`);
    const clock = (c) => (c ? `, ${c.source} ± ${c.error_ms < 10 ? c.error_ms.toFixed(1) : c.error_ms.toFixed(0)} ms` : "");
    rows.push(["engine", facts.engine.join(", ") || "unknown"]);
    rows.push(["capture to publish", `${facts.publish_ms.toFixed(1)} ms`]);
    rows.push(["infrared age", age(facts.ages_ms.infrared) + clock(facts.clocks.infrared), facts.ages_ms.infrared === null]);
    rows.push(["visible age", age(facts.ages_ms.visible) + clock(facts.clocks.visible), facts.ages_ms.visible === null]);
    if (facts.skew_ms !== null) rows.push(["infrared − visible", `${facts.skew_ms.toFixed(1).replace("-", "−")} ms`]);
    rows.push(["registration", facts.calibrated ? "calibrated" : "uncalibrated", !facts.calibrated]);
    const lost = Object.entries(facts.drops).filter(([, count]) => count);
    rows.push(["dropped", lost.map(([stage, count]) => `${stage} ${count}`).join(", ") || "none"]);
    const flags = facts.flags.filter((flag) => flag !== "uncalibrated");
    if (flags.length) rows.push(["flags", flags.join(", ").replaceAll("_", " "), true]);
  }
  element("facts").replaceChildren(...rows.flatMap(([name, value, warn]) => [
    make("dt", "", name), make("dd", warn ? "warn" : "", value),
  ]));
}

function showEvent(event) {
  const item = make("li");
  item.title = event.text;
  const time = new Date(event.utc_ms).toLocaleTimeString([], { hour12: false });
  item.append(make("time", "", time), `${event.kind.replaceAll("_", " ")}: ${event.text}`);
  const list = element("events");
  list.prepend(item);
  while (list.children.length > 4) list.lastChild.remove();
}

// -- one picture alone ------------------------------------------------------------------------------------------

function toggle(tile) {
  const pictures = element("pictures");
  const chosen = !tile.classList.contains("chosen");
  for (const other of pictures.children) other.classList.remove("chosen");
  tile.classList.toggle("chosen", chosen);
  pictures.classList.toggle("solo", chosen);
}
for (const { tile } of Object.values(streams)) {
  tile.addEventListener("click", () => toggle(tile));
  tile.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), toggle(tile)));
}

connect();
setInterval(refresh, 200);
setInterval(ping, 2000);
refresh();
