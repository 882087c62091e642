"use strict";
// The chart of times to the first token: one line per prefiller over the last five minutes.

const SPAN = 300;                 // seconds shown
const GAP = 20;                   // seconds without a prefill after which a line is broken
const MARGIN = { top: 12, right: 14, bottom: 22, left: 56 };
const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function color(index) { return `var(--s${index % 8})`; }

/** Milliseconds for people. */
function ms(value) {
  if (value === undefined || value === null) return "–";
  if (value >= 60000) return `${(value / 60000).toFixed(1)} min`;
  if (value >= 1000) return `${Number((value / 1000).toFixed(value < 10000 ? 2 : 1))} s`;
  return `${Number(value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0))} ms`;
}

/** The smallest 1, 2 or 5 times a power of ten that is not below `value`. */
function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 2, 5, 10]) if (step * power >= value * 0.999) return step * power;
  return 10 * power;
}

class Chart {
  constructor(host) {
    this.host = host;
    this.pointer = null;          // x in pixels, while the pointer is over the chart
    this.series = [];
    host.addEventListener("pointermove", (event) => {
      this.pointer = event.clientX - host.getBoundingClientRect().left;
      this.draw();
    });
    host.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(host);
  }

  /** `series`: [{name, recent: [[age s, count, mean ms, worst ms], …]}]. */
  show(series) {
    this.series = series;
    this.draw();
  }

  draw() {
    const width = this.host.clientWidth, height = this.host.clientHeight;
    if (!width || !height) return;
    const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    const means = this.series.flatMap((s) => s.recent.map((p) => p[2]));
    if (!means.length) {
      this.host.replaceChildren(el("p", { class: "empty" }, "No prefill in the last five minutes."));
      return;
    }
    const step = nice(Math.max(...means, 0.01) * 1.05 / 4), top = step * Math.ceil(Math.max(...means, 0.01) * 1.02 / step);
    const x = (age) => MARGIN.left + inner.w * (1 - age / SPAN);
    const y = (value) => MARGIN.top + inner.h * (1 - Math.min(value, top) / top);

    const root = svg("svg", { role: "img", "aria-label": this.summary(), viewBox: `0 0 ${width} ${height}` });
    for (let value = 0; value <= top * 1.001; value += step) {
      root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      root.append(svg("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, value === 0 ? "0" : ms(value)));
    }
    for (let age = SPAN; age >= 0; age -= 60) {
      const label = age === 0 ? "now" : `−${age / 60} min`;
      const anchor = age === 0 ? "end" : age === SPAN ? "start" : "middle";
      root.append(svg("text", { x: x(age), y: height - 4, "text-anchor": anchor }, label));
    }
    this.series.forEach((s, i) => this.line(root, s, i, x, y));
    const parts = [root];
    if (this.pointer !== null) this.cross(root, parts, width, height, x, y);
    this.host.replaceChildren(...parts);
  }

  line(root, series, index, x, y) {
    let path = "", last = null;
    series.recent.forEach(([age, , mean], i) => {
      const joined = last !== null && last - age <= GAP;
      path += `${joined ? "L" : "M"}${x(age).toFixed(1)} ${y(mean).toFixed(1)}`;
      const next = series.recent[i + 1];
      // A point between two gaps would be no line at all.
      if (!joined && !(next && age - next[0] <= GAP)) {
        root.append(svg("circle", { cx: x(age), cy: y(mean), r: 2.5, style: `fill:${color(index)}` }));
      }
      last = age;
    });
    root.append(svg("path", { class: "line", d: path, style: `stroke:${color(index)}` }));
  }

  /** The values under the pointer. */
  cross(root, parts, width, height, x, y) {
    const wanted = SPAN * (1 - (this.pointer - MARGIN.left) / (width - MARGIN.left - MARGIN.right));
    const found = this.series.map((s, i) => {
      const near = s.recent.reduce((best, p) => !best || Math.abs(p[0] - wanted) < Math.abs(best[0] - wanted) ? p : best, null);
      return near && Math.abs(near[0] - wanted) <= 10 ? { name: s.name, index: i, point: near } : null;
    }).filter(Boolean);
    if (!found.length) return;
    const age = found[0].point[0];
    root.append(svg("line", { class: "cross", x1: x(age), x2: x(age), y1: MARGIN.top, y2: height - MARGIN.bottom }));
    const tip = el("div", { class: "tip" }, el("p", {}, age === 0 ? "now" : `${age} s ago`));
    for (const { name, index, point } of found) {
      root.append(svg("circle", { cx: x(point[0]), cy: y(point[2]), r: 3.5, style: `fill:${color(index)}` }));
      const key = el("span", { class: "key" });
      key.style.background = color(index);
      tip.append(el("p", {}, key, `${name}: ${ms(point[2])}`, ` (${point[1]}, longest ${ms(point[3])})`));
    }
    tip.style[x(age) > width / 2 ? "right" : "left"] = `${(x(age) > width / 2 ? width - x(age) : x(age)) + 10}px`;
    parts.push(tip);
  }

  summary() {
    const parts = this.series.filter((s) => s.recent.length).map((s) => {
      const last = s.recent[s.recent.length - 1];
      return `${s.name} ${ms(last[2])}`;
    });
    return `Time to first token over the last five minutes. Latest: ${parts.join(", ")}. The table below has the figures.`;
  }
}
