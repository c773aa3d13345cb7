"use strict";
// Draws the charts of the page again at the width they have, and answers to pointer, keyboard and buttons. The numbers
// are in the element "race"; without this script the pictures in the page stay as they are.
(() => {
  const race = JSON.parse(document.getElementById("race").textContent);
  const armOf = new Map(race.recipes.map((name, number) => [name, number]));
  const hidden = new Set();
  const LABEL_HEIGHT = 12;
  const MARGIN = { left: 54, right: 22, top: 10, bottom: 38 };

  // ---- small helpers ----

  function html(tag, parent, text = "", attributes = {}) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    parent.append(made);
    return made;
  }

  // Five significant digits, but no decimals beyond the second digit of the half width: they would say nothing.
  function figureText(value, half = null) {
    const size = Math.abs(value);
    if (size > 0 && size < 1e-3) return value.toExponential(3) + (half === null ? "" : ` ± ${half.toExponential(1)}`);
    const decimals = (number, digits) => Math.max(0, digits - 1 - (number ? Math.floor(Math.log10(number)) : 0));
    const most = Math.min(decimals(size, 5), half ? decimals(half, 2) : Infinity);
    const text = (number) => number.toLocaleString("en", { maximumFractionDigits: most });
    return half === null ? text(value) : `${text(value)} ± ${text(half)}`;
  }

  function shortText(value) {
    const size = Math.abs(value);
    const [unit, letter] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "k"] : [1, ""];
    const part = value / unit;
    return (part !== 0 && Math.abs(part) < 1e-4 ? part.toExponential() : String(Number(part.toPrecision(6)))) + letter;
  }

  function linearTicks([low, high], most) {
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
    return ticks;
  }

  function logTicks([low, high], most) {
    const ticks = [];
    const factors = Math.log10(high / low) > 2 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      ticks.push(...factors.map((factor) => factor * 10 ** power));
    }
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length < 2) return linearTicks([low, high], most);
    const every = Math.ceil(inside.length / most);
    return inside.filter((_, number) => number % every === 0);
  }

  // The value of a curve at x, on the line between its points; null outside of them by more than `reach`.
  function valueAt(xs, ys, x, reach) {
    const last = xs.length - 1;
    if (x < xs[0] - reach || x > xs[last] + reach) return null;
    const after = xs.findIndex((value) => value >= x);
    if (after <= 0) return ys[after === 0 ? 0 : last];
    const part = (x - xs[after - 1]) / (xs[after] - xs[after - 1]);
    if (ys[after - 1] === null || ys[after] === null) return null;
    return ys[after - 1] + part * (ys[after] - ys[after - 1]);
  }

  // ---- one chart ----

  class Chart {
    constructor(figure, data) {
      Object.assign(this, { figure, data, view: 0, logX: false, logY: false, whole: false, at: null });
      this.svg = figure.querySelector("svg");
      this.space = this.svg.namespaceURI;
      this.addControls();
      this.read = html("output", figure, "", { class: "read" });
      this.svg.setAttribute("tabindex", "0");
      this.svg.setAttribute("aria-label", `${this.svg.getAttribute("aria-label")}. Arrow keys read values.`);
      this.svg.addEventListener("pointermove", (event) => this.point(event));
      this.svg.addEventListener("pointerdown", (event) => this.point(event));
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    addControls() {
      const row = document.createElement("div");
      row.className = "controls";
      this.svg.before(row);
      const views = this.data.views.map((view, number) => {
        if (this.data.views.length === 1) return null;
        const button = html("button", row, view.axis.split(" (")[0], { type: "button", "aria-pressed": number === 0 });
        button.addEventListener("click", () => {
          Object.assign(this, { view: number, at: null });
          views.forEach((other, k) => other.setAttribute("aria-pressed", k === number));
          this.draw();
        });
        return button;
      });
      for (const [words, name] of [["log x", "logX"], ["log y", "logY"], ["whole range", "whole"]]) {
        const button = html("button", row, words, { type: "button", "aria-pressed": "false" });
        button.addEventListener("click", () => {
          this[name] = !this[name];
          button.setAttribute("aria-pressed", this[name]);
          this.draw();
        });
      }
    }

    // What is shown: the curves and means of visible arms, without points that a logarithm has no place for.
    shown() {
      const inside = (x, y) => (!this.logX || x > 0) && (!this.logY || y > 0);
      const kept = (line) => {
        const keep = line.x.map((x, k) => inside(x, line.y[k]));
        const pick = (values) => values && values.filter((_, k) => keep[k]);
        return { ...line, arm: armOf.get(line.recipe), x: pick(line.x), y: pick(line.y), half: pick(line.half) };
      };
      const of = (lines) => lines.filter((line) => !hidden.has(line.recipe)).map(kept).filter((line) => line.x.length);
      const view = this.data.views[this.view];
      return { axis: view.axis, curves: of(view.curves), means: of(view.means) };
    }

    ranges(curves) {
      const xs = curves.flatMap((curve) => curve.x);
      const [first, last] = [Math.min(...xs), Math.max(...xs)];
      const late = this.whole ? first : first + race.zoom * (last - first);
      const ys = curves.flatMap((curve) => curve.y.filter((_, k) => curve.x[k] >= late));
      let [low, high] = [Math.min(...ys), Math.max(...ys)];
      if (this.logY) [low, high] = [low / (high / low) ** 0.05, high * (high / low) ** 0.05];
      else {
        const margin = 0.05 * (high - low);
        [low, high] = [this.data.from_zero ? Math.min(0, low) : low - margin, high + margin];
      }
      if (high <= low) [low, high] = [low - 0.05 * (Math.abs(low) || 1), high + 0.05 * (Math.abs(high) || 1)];
      return [[first, last > first ? last : first + 1], [low, high]];
    }

    make(tag, attributes, text = "", parent = this.svg) {
      const made = document.createElementNS(this.space, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      made.textContent = text;
      parent.append(made);
      return made;
    }

    draw() {
      const width = Math.max(240, Math.round(this.figure.querySelector(".controls").clientWidth));
      const height = Math.round(Math.min(340, Math.max(220, width * 0.6)));
      const { axis, curves, means } = this.shown();
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.frame = null;
      if (!curves.length) {
        this.make("text", { x: width / 2, y: height / 2, class: "title" }, "no arm is shown, or none has such values");
        this.read.replaceChildren();
        return;
      }
      const [across, up] = this.ranges(curves);
      const { left, right, top, bottom } = MARGIN;
      const box = { left, top, width: width - left - right, height: height - top - bottom };
      const scale = (value, [low, high], log) =>
        log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
      const toX = (value) => box.left + scale(value, across, this.logX) * box.width;
      const toY = (value) => box.top + (1 - scale(value, up, this.logY)) * box.height;
      this.frame = { box, across, up, toX, toY, axis, curves, means };
      this.drawGrid();
      this.drawLines();
      this.drawEnds();
      this.marks = this.make("g", {});
      this.readOut();
    }

    drawGrid() {
      const { box, across, up, toX, toY, axis } = this.frame;
      const bottom = box.top + box.height;
      for (const tick of (this.logY ? logTicks : linearTicks)(up, Math.max(3, box.height / 50))) {
        this.make("path", { class: "grid", d: `M${box.left},${toY(tick).toFixed(1)}h${box.width}` });
        this.make("text", { class: "tick y", x: box.left - 6, y: toY(tick) + 4 }, shortText(tick));
      }
      for (const tick of (this.logX ? logTicks : linearTicks)(across, Math.max(3, box.width / 80))) {
        this.make("text", { class: "tick x", x: toX(tick), y: bottom + 15 }, shortText(tick));
      }
      this.make("path", { class: "axis", d: `M${box.left},${bottom}h${box.width}` });
      this.make("text", { class: "title", x: box.left + box.width / 2, y: bottom + 32 }, axis);
    }

    drawLines() {
      const { box, up, toX, toY, curves, means } = this.frame;
      const clip = { x: box.left, y: box.top, width: box.width, height: box.height };
      const inner = this.make("svg", { ...clip, viewBox: Object.values(clip).join(" ") });
      // Far outside, a coordinate says no more than "outside".
      const place = (x, y) => `${toX(x).toFixed(1)},${Math.max(-1e4, Math.min(1e4, toY(y))).toFixed(1)}`;
      // A line of no length, so that a lone point is drawn as its round cap.
      const path = (xs, ys) => xs.map((x, k) => place(x, ys[k])).join("L") + (xs.length === 1 ? "h0" : "");
      for (const { arm, x, y, half } of means) {
        if (half.includes(null)) continue;
        const lower = y.map((value, k) => Math.max(value - half[k], this.logY ? up[0] / 10 : -Infinity));
        const upper = path(x, y.map((value, k) => value + half[k]));
        const back = path([...x].reverse(), lower.reverse());
        this.make("path", { class: `band arm-${arm}`, d: `M${upper}L${back}Z` }, "", inner);
      }
      for (const { arm, x, y, finished } of curves) {
        const kind = `run${x.length === 1 ? " lone" : ""}${finished ? "" : " unfinished"}`;
        this.make("path", { class: `${kind} arm-${arm}`, d: `M${path(x, y)}` }, "", inner);
      }
      for (const { arm, x, y } of means) {
        this.make("path", { class: `mean arm-${arm}`, d: `M${path(x, y)}` }, "", inner);
      }
    }

    drawEnds() {
      const { box, toX, toY, means } = this.frame;
      const [top, bottom] = [box.top, box.top + box.height];
      const ends = means
        .map(({ arm, x, y }) => ({ arm, x: toX(x.at(-1)) + 4, y: toY(y.at(-1)) }))
        .filter(({ y }) => y >= top && y <= bottom)
        .sort((one, other) => one.y - other.y);
      ends.forEach((end, k) => (end.y = Math.max(end.y, k ? ends[k - 1].y + LABEL_HEIGHT : top)));
      ends.reverse().forEach((end, k) => (end.y = Math.min(end.y, k ? ends[k - 1].y - LABEL_HEIGHT : bottom)));
      for (const { arm, x, y } of ends) this.make("text", { class: `end arm-${arm}`, x, y: y + 4 }, String(arm + 1));
    }

    // What is read out: means, and the runs of recipes that have none.
    lines() {
      const { means, curves } = this.frame;
      const averaged = new Set(means.map((mean) => mean.recipe));
      return [...means, ...curves.filter((curve) => !averaged.has(curve.recipe))];
    }

    // The x of every point that is read out, in order.
    stops() {
      const xs = this.lines().flatMap((line) => line.x);
      return [...new Set(xs)].sort((one, other) => one - other);
    }

    point(event) {
      if (!this.frame) return;
      const { box, toX } = this.frame;
      const bounds = this.svg.getBoundingClientRect();
      const across = ((event.clientX - bounds.left) / bounds.width) * (box.width + MARGIN.left + MARGIN.right);
      this.at = this.stops().reduce((best, x) => (Math.abs(toX(x) - across) < Math.abs(toX(best) - across) ? x : best));
      this.readOut();
    }

    key(event) {
      if (!this.frame || !["ArrowLeft", "ArrowRight", "Home", "End", "Escape"].includes(event.key)) return;
      event.preventDefault();
      const stops = this.stops();
      const here = stops.includes(this.at) ? stops.indexOf(this.at) : stops.length - 1;
      const leap = Math.ceil(stops.length / 60);
      const next = { ArrowLeft: here - leap, ArrowRight: here + leap, Home: 0, End: stops.length - 1 }[event.key];
      this.at = event.key === "Escape" ? null : stops[Math.max(0, Math.min(stops.length - 1, next))];
      this.readOut();
    }

    // What every visible arm has where the pointer is, or at its end.
    readOut() {
      const { box, across, toX, toY, axis } = this.frame;
      const at = this.stops().includes(this.at) ? this.at : null;
      this.marks.replaceChildren();
      this.read.replaceChildren();
      html("span", this.read, `${axis}: ${at === null ? "the end of each line" : figureText(at)}`);
      if (at !== null) this.make("path", { class: "cross", d: `M${toX(at)},${box.top}v${box.height}` }, "", this.marks);
      for (const line of this.lines()) {
        const x = at ?? line.x.at(-1);
        const value = valueAt(line.x, line.y, x, 0.02 * (across[1] - across[0]));
        const half = value === null || !line.half ? null : valueAt(line.x, line.half, x, Infinity);
        this.read.append(" ");
        const entry = html("span", this.read, "", { class: `arm-${line.arm}` });
        html("b", entry, String(line.arm + 1), { class: "key" });
        entry.append(` ${line.trial ?? line.recipe} ${value === null ? "–" : figureText(value, half)}`);
        const inside = value !== null && toY(value) >= box.top && toY(value) <= box.top + box.height;
        if (at !== null && inside) {
          this.make("circle", { class: `dot arm-${line.arm}`, cx: toX(at), cy: toY(value), r: 3 }, "", this.marks);
        }
      }
    }
  }

  // ---- the page ----

  const charts = [...document.querySelectorAll("figure.chart")].map(
    (figure) => new Chart(figure, race.charts[Number(figure.dataset.chart)]),
  );
  const drawAll = () => charts.forEach((chart) => chart.draw());

  for (const box of document.querySelectorAll(".arms input")) {
    box.disabled = false;
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(box.value);
      else hidden.add(box.value);
      drawAll();
    });
  }

  const root = document.documentElement;
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = html("button", document.querySelector("header"), "", { type: "button", class: "theme" });
  const nameTheme = () => (theme.textContent = isDark() ? "Light" : "Dark");
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  nameTheme();

  let width = 0;
  new ResizeObserver(() => {
    if (width !== document.body.clientWidth) {
      width = document.body.clientWidth;
      drawAll();
    }
  }).observe(document.body);
})();
