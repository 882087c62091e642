// The page: asks for /stats every second and draws what it says. Everything from the proxy is set as text.

const EVERY = 1000;               // ms between two questions
const PATIENCE = 4000;            // ms for one answer
const RATE_OVER = 10000;          // ms over which rates are taken
const PHASES = { queue: "Queue", route: "Tokenize and route", prefill: "Prefill", kv_wait: "KV wait",
  first_decode: "First decoded token", rest: "Rest of the answer", decode: "Decode", total: "Total" };
const WAY = [["queued", "Queued"], ["admitted", "Tokenize"], ["waiting", "Wait for room"], ["prefill", "Prefill"],
  ["kv", "KV transfer"], ["decode", "Decode"]];

const $ = (id) => document.getElementById(id);
const chart = new Chart($("chart"));
let history = [];                 // [{at, done, tokens}] for rates
let answered = null;              // time of the last good answer
let timer = null;

function count(value) { return Number(value ?? 0).toLocaleString("en"); }

function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function cell(content, kind = "") {
  const td = el("td", kind ? { class: kind } : {});
  td.append(...[content].flat());
  return td;
}

function heading(...content) { return el("th", { scope: "row" }, ...content); }

function fill(table, rows, empty, columns) {
  const body = $(table).tBodies[0];
  if (!rows.length) rows = [el("tr", {}, el("td", { class: "none", colspan: columns }, empty))];
  body.replaceChildren(...rows);
}

function pill(text, kind) { return el("span", { class: `pill ${kind}` }, text); }

/** A bar with parts, each a share between 0 and 1. */
function bar(kind, ...shares) {
  const span = el("span", { class: `bar ${kind}`, "aria-hidden": "true" });
  for (const share of shares) {
    const part = el("i");
    part.style.width = `${Math.min(100, Math.max(0, share * 100))}%`;
    span.append(part);
  }
  return span;
}

function rates(stats) {
  const done = Object.values(stats.requests ?? {}).reduce((a, b) => a + b, 0);
  const now = { at: stats.unix_ms, done, tokens: stats.output_tokens ?? 0 };
  // The proxy was started anew: what was counted before means nothing.
  if (history.length && history[history.length - 1].done > done) history = [];
  history = history.filter((entry) => now.at - entry.at <= RATE_OVER);
  history.push(now);
  const first = history[0], seconds = (now.at - first.at) / 1000;
  if (seconds < 0.5) return { requests: null, tokens: null };
  return { requests: (now.done - first.done) / seconds, tokens: (now.tokens - first.tokens) / seconds };
}

function figures(stats) {
  const rate = rates(stats), requests = stats.requests ?? {};
  const number = (value) => value === null ? "–" : value.toFixed(value < 10 ? 1 : 0);
  const failed = (requests.failed ?? 0), busy = requests.busy ?? 0;
  const list = [
    ["Requests a second", number(rate.requests)],
    ["Output tokens a second", number(rate.tokens)],
    ["In flight", count((stats.in_flight ?? []).length)],
    ["Answered", count(requests.ok)],
    ["Failed", count(failed), busy ? `${count(busy)} turned away` : ""],
    ["Median answer time", ms(stats.phases?.total?.p50_ms)],
  ];
  $("figures").replaceChildren(...list.map(([name, value, note]) => {
    const dd = el("dd", {}, value);
    if (note) dd.append(el("small", {}, note));
    return el("div", {}, el("dt", {}, name), dd);
  }));
}

function way(stats) {
  $("way").replaceChildren(...WAY.map(([key, name]) => {
    const number = stats[key] ?? 0;
    return el("li", number ? { class: "busy" } : {}, name, el("b", {}, count(number)));
  }));
}

function ttft(stats) {
  const series = stats.ttft ?? [];
  chart.show(series);
  fill("ttft", series.map((s, i) => {
    const key = el("span", { class: "key" });
    key.style.background = color(i);
    return el("tr", {}, heading(key, s.name), cell(count(s.count)), cell(ms(s.mean_ms)), cell(ms(s.p50_ms)),
      cell(ms(s.p99_ms)), cell(ms(s.max_ms)));
  }), "No prefiller has answered yet.", 6);
}

function stateOf(instance) {
  const parts = [];
  if (instance.health === "down") {
    parts.push(pill("Down", "bad"));
    if (instance.down_ms !== undefined) parts.push(el("span", { class: "note" }, `for ${duration(instance.down_ms / 1000)}`));
    if (instance.why) parts.push(el("span", { class: "note" }, instance.why));
  } else if (instance.health === "up") {
    parts.push(pill("Up", "good"));
  } else {
    parts.push(pill("Not probed yet", ""));
  }
  if (instance.breaker === "open") parts.push(" ", pill("Breaker open", "bad"));
  if (instance.breaker === "trial") parts.push(" ", pill("On trial", "warn"));
  if (instance.admin === "draining") parts.push(" ", pill("Draining", "warn"));
  if (instance.admin === "removing") parts.push(" ", pill("Leaving", "warn"));
  return parts;
}

function instances(stats) {
  const list = stats.instances ?? [];
  const most = Math.max(1, ...list.map((i) => i.requests));
  fill("instances", list.map((instance) => {
    const limit = instance.max_requests;
    const load = [count(instance.requests) + (limit ? ` of ${count(limit)}` : ""),
      bar("load", instance.requests / (limit || most))];
    const ranks = instance.tp_ranks > 1 ? [el("span", { class: "note" }, `${instance.tp_ranks} ranks`)] : [];
    return el("tr", {},
      heading(instance.name), cell([el("span", { class: "mono" }, instance.address), ...ranks]),
      cell(stateOf(instance), "why"), cell(load), cell(count(instance.tokens)), cell(count(instance.weight)),
      cell(count(instance.started)), cell(count(instance.failed)));
  }), "No instance is configured.", 8);
}

function phases(stats) {
  const known = stats.phases ?? {};
  const names = Object.keys(PHASES).filter((name) => known[name]);
  // The rest is as long as the client asks for; it would leave no room for what the proxy is about.
  const drawn = (name) => name !== "total" && name !== "rest";
  const longest = Math.max(0.001, ...names.filter(drawn).map((n) => known[n].p99_ms));
  fill("phases", names.map((name) => {
    const q = known[name];
    const share = !drawn(name) ? "" : bar("", q.p99_ms / longest, q.p50_ms / longest);
    return el("tr", {}, heading(PHASES[name]), cell(ms(q.p50_ms)), cell(ms(q.p99_ms)), cell(share));
  }), "No request has been answered yet.", 4);
}

function requests(stats) {
  const rows = stats.in_flight ?? [];
  const shown = rows.slice(0, 50);
  $("more").textContent = rows.length > shown.length ? `the oldest ${shown.length} of ${count(rows.length)}` : "";
  fill("requests", shown.map((row) => {
    const route = [row.prefiller, row.decoder].filter(Boolean).join(" → ") || "–";
    const id = el("span", { class: "mono cut", title: row.id }, row.id);
    const phase = [pill(PHASES[row.phase] ?? row.phase, ""), el("span", { class: "note" }, ms(row.phase_ms))];
    return el("tr", {}, cell(id), cell(ms(row.age_ms)), cell(phase), cell(count(row.prompt_tokens)),
      cell(count(row.output_tokens)), cell(route));
  }), "None at this moment.", 6);
}

function show(stats) {
  answered = Date.now();
  $("main").hidden = false;
  $("main").classList.remove("old");
  $("trouble").hidden = true;
  $("login").hidden = true;
  const usable = (stats.instances ?? []).some((i) => i.usable);
  state(stats.ending ? ["Ending", "warn"] : usable || !stats.instances ? ["Serving", "good"] : ["No instance can serve", "bad"]);
  $("about").textContent = `version ${stats.version}, up ${duration(stats.uptime_s)}`;
  figures(stats);
  way(stats);
  ttft(stats);
  instances(stats);
  phases(stats);
  requests(stats);
}

/** Sets the pill only when it changes, so that a screen reader is told once. */
function state([text, kind]) {
  const node = $("state");
  if (node.textContent !== text) node.textContent = text;
  node.className = `pill ${kind}`;
}

function lost(reason) {
  state(["Not answering", "bad"]);
  $("main").classList.add("old");
  const since = answered === null ? "" :
    ` What you see is from ${new Date(answered).toLocaleTimeString()}.`;
  const text = `The proxy does not answer (${reason}).${since} Trying again every second.`;
  if ($("trouble").textContent !== text) $("trouble").textContent = text;
  $("trouble").hidden = false;
}

async function ask() {
  const key = sessionStorage.getItem("kvxfer-key");
  try {
    const answer = await fetch("stats", {
      cache: "no-store",
      headers: key ? { authorization: `Bearer ${key}` } : {},
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (answer.status === 401 || answer.status === 403) {
      state(["Locked", "warn"]);
      $("login").hidden = false;
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    lost(error.name === "TimeoutError" ? "no answer in time" : error instanceof TypeError ? "no connection" : error.message);
  }
}

async function turn() {
  clearTimeout(timer);
  // Nobody looks: the proxy is left alone.
  if (!document.hidden) await ask();
  clearTimeout(timer);
  timer = setTimeout(turn, EVERY);
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("kvxfer-key", $("key").value);
  turn();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) turn(); });
turn();
