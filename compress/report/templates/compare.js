"use strict";
// Draws the plots and sorts the table. Everything it shows of the models' names goes through textContent.
const { models, axes, plots } = JSON.parse(document.getElementById("data").textContent);

function element(parent, name, attributes = {}, text = "") {
  const svg = name === "svg" || parent instanceof SVGElement;
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  parent.append(made);
  return made;
}

// --- scales ---

function scale(figures, start, end) {
  const ends = figures.flatMap(({ value, low, high }) => [value, low ?? value, high ?? value]);
  const values = figures.map((figure) => figure.value);
  const logarithmic = Math.min(...values) > 0 && Math.max(...values) > 20 * Math.min(...values);
  const least = Math.min(...values) / 2;
  const to = logarithmic ? (value) => Math.log10(Math.max(value, least)) : (value) => value;
  let [low, high] = [Math.min(...ends.map(to)), Math.max(...ends.map(to))];
  if (!logarithmic && low > 0 && low < 0.4 * high) low = 0;
  const margin = 0.06 * (high - low || Math.abs(high) || 1);
  if (low !== 0 || logarithmic || ends.includes(0)) low -= margin;
  high += margin;
  const place = (value) => start + ((to(value) - low) / (high - low)) * (end - start);
  const ticks = logarithmic ? logTicks(low, high) : linearTicks(low, high, Math.abs(end - start) / 70);
  return { place, ticks, logarithmic };
}

function linearTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(2, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => {
    const digits = Math.max(0, -Math.floor(Math.log10(step)));
    return { at: (first + index) * step, text: shown((first + index) * step, digits) };
  });
}

function logTicks(low, high) {
  const factors = high - low > 3 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const factor of factors) ticks.push(factor * 10 ** power);
  return ticks.filter((at) => Math.log10(at) >= low && Math.log10(at) <= high)
    .map((at) => ({ at, text: shown(at, Math.max(0, -Math.floor(Math.log10(at)))) }));
}

function shown(number, digits) {
  const text = number.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return text.replace("-", "−");
}

// --- plots ---

function makePlot({ title, x, y }, index) {
  const figure = element(document.getElementById("plots"), "figure");
  element(figure, "h2", {}, title);
  const chosen = { y: choice(figure, `y${index}`, "Vertical", y), x: choice(figure, `x${index}`, "Horizontal", x) };
  const canvas = element(figure, "svg", { role: "img" });
  const caption = element(figure, "figcaption");
  const legend = element(figure, "ul", { class: "legend" });
  const redraw = () => draw(canvas, caption, legend, axes[chosen.x.value], axes[chosen.y.value]);
  chosen.x.addEventListener("change", redraw);
  chosen.y.addEventListener("change", redraw);
  let width = 0;
  new ResizeObserver(() => {
    if (width !== figure.clientWidth) { width = figure.clientWidth; redraw(); }
  }).observe(figure);
}

function choice(figure, id, label, key) {
  const select = element(element(figure, "label", {}, `${label}: `), "select", { id });
  const groups = new Map();
  axes.forEach((axis, index) => {
    if (!groups.has(axis.group)) groups.set(axis.group, element(select, "optgroup", { label: axis.group }));
    const option = element(groups.get(axis.group), "option", { value: index }, axis.label);
    option.selected = axis.key === key;
  });
  return select;
}

function draw(canvas, caption, legend, x, y) {
  const points = models.map((model, index) => ({ ...model, number: index + 1, x: x.figures[index], y: y.figures[index] }));
  const known = points.filter((point) => point.x && point.y);
  const width = canvas.parentNode.clientWidth;
  const height = Math.round(Math.min(420, Math.max(280, 0.62 * width)));
  canvas.replaceChildren();
  canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
  canvas.setAttribute("height", height);
  canvas.setAttribute("aria-label", `${y.label} against ${x.label} of ${known.length} model${known.length === 1 ? "" : "s"}. ${known.map(told).join("; ")}.`);
  legend.replaceChildren();
  const best = front(known, x, y);
  caption.textContent = explained(points, known, best);
  if (!known.length) return;
  const box = { left: 58, right: width - 12, top: 12, bottom: height - 44 };
  const [across, up] = [scale(known.map((p) => p.x), box.left, box.right), scale(known.map((p) => p.y), box.bottom, box.top)];
  for (const point of known) { point.left = across.place(point.x.value); point.top = up.place(point.y.value); }
  drawAxes(canvas, box, across, up, x, y);
  if (best.length > 1) element(canvas, "path", { class: "front", d: `M${best.map((p) => `${p.left} ${p.top}`).join("L")}` });
  const lines = known.flatMap((point) => drawPoint(canvas, point, across, up));
  const hidden = drawLabels(canvas, known, lines, box);
  for (const point of hidden) element(legend, "li", {}, `${point.number} ${point.name}`);
}

const told = (point) => `${point.name}${point.dense ? " (dense)" : ""}: ${point.y.text} at ${point.x.text}`;

function explained(points, known, best) {
  const missing = points.filter((point) => !known.includes(point)).map((point) => point.name);
  return [
    "Bars are intervals.",
    known.some((point) => point.dense) ? "The hollow point is the dense model." : "",
    best.length > 1 ? "The line joins the models that no other model beats in both." : "",
    missing.length ? `Without a figure: ${missing.join(", ")}.` : "",
  ].filter(Boolean).join(" ");
}

function drawAxes(canvas, box, across, up, x, y) {
  element(canvas, "path", { class: "axis", d: `M${box.left} ${box.top}V${box.bottom}H${box.right}` });
  for (const { at, text } of across.ticks)
    element(canvas, "text", { x: across.place(at), y: box.bottom + 16, "text-anchor": "middle" }, text);
  for (const { at, text } of up.ticks) {
    element(canvas, "path", { class: "grid", d: `M${box.left} ${up.place(at)}H${box.right}` });
    element(canvas, "text", { x: box.left - 6, y: up.place(at) + 4, "text-anchor": "end" }, text);
  }
  const titled = (axis, drawn) => axis.label + better(axis) + (drawn.logarithmic ? ", logarithmic" : "");
  element(canvas, "text", { x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle" }, titled(x, across));
  element(canvas, "text", { transform: `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, titled(y, up));
}

const better = (axis) => ({ 1: " (more is better)", "-1": " (less is better)" })[axis.better] ?? "";

// The models that no other model beats in both, ordered along the horizontal axis.
function front(known, x, y) {
  if (!x.better || !y.better) return [];
  const ordered = [...known].sort((a, b) => x.better * (b.x.value - a.x.value) || y.better * (b.y.value - a.y.value));
  const best = [];
  for (const point of ordered)
    if (!best.length || y.better * point.y.value > y.better * best.at(-1).y.value) best.push(point);
  return best;
}

function drawPoint(canvas, point, across, up) {
  const group = element(canvas, "g", { class: point.dense ? "dense" : "" });
  element(group, "title", {}, `${told(point)}`);
  const lines = [];
  if (point.x.low !== null)
    lines.push({ left: across.place(point.x.low), right: across.place(point.x.high), top: point.top, bottom: point.top });
  if (point.y.low !== null)
    lines.push({ left: point.left, right: point.left, top: up.place(point.y.high), bottom: up.place(point.y.low) });
  for (const { left, right, top, bottom } of lines)
    element(group, "path", { class: "interval", d: `M${left} ${bottom}L${right} ${top}` });
  element(group, "circle", { cx: point.left, cy: point.top, r: 5 });
  return lines;
}

// Writes each model's name where it covers nothing, else its number. Returns the models to explain in a legend.
function drawLabels(canvas, known, lines, box) {
  const taken = known.map(({ left, top }) => ({ left: left - 6, right: left + 6, top: top - 6, bottom: top + 6 }));
  taken.push(...lines);
  const free = (area) => area.left >= box.left && area.right <= box.right && area.top >= 0 && area.bottom <= box.bottom
    && !taken.some((other) => area.left < other.right && other.left < area.right && area.top < other.bottom && other.top < area.bottom);
  const put = (point, text, last) => {
    const label = element(canvas, "text", { class: "label" }, text);
    const width = label.getComputedTextLength();
    const places = [[9, 0], [-9 - width, 0], [6, -13], [6, 13], [-6 - width, -13], [-6 - width, 13], [-width / 2, -15], [-width / 2, 15]];
    for (const [dx, dy] of places) {
      const area = { left: point.left + dx, right: point.left + dx + width, top: point.top + dy - 7, bottom: point.top + dy + 7 };
      if (!free(area) && !last) continue;
      label.setAttribute("x", area.left);
      label.setAttribute("y", point.top + dy + 4);
      taken.push(area);
      return true;
    }
    label.remove();
    return false;
  };
  return known.filter((point) => {
    const short = point.name.length > 28 ? `${point.name.slice(0, 27)}…` : point.name;
    return !put(point, short) && (put(point, String(point.number), true), true);
  });
}

// --- the table ---

function makeSortable(table) {
  const order = [...table.querySelectorAll(".sortable th")];
  order.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      for (const other of order) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table.tBodies[0], column, down ? -1 : 1);
      document.getElementById("sorted").textContent =
        `Sorted by ${button.textContent.replace(/\s+/g, " ")}, ${down ? "descending" : "ascending"}.`;
    });
  });
}

// The dense model stays on top, and what was not measured goes to the end in both directions.
function sort(body, column, direction) {
  const value = (row) => row.cells[column].dataset.value;
  const compared = (a, b) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const [first, second] = [Number(a), Number(b)];
    const numeric = !Number.isNaN(first) && !Number.isNaN(second);
    return direction * (numeric ? first - second : a.localeCompare(b, "en", { numeric: true }));
  };
  const dense = (row) => Number(!row.classList.contains("dense"));
  body.append(...[...body.rows].sort((a, b) => dense(a) - dense(b) || compared(value(a), value(b))));
}

function makeDetails(table) {
  if (!table.querySelector(".detail")) return;
  const label = element(document.getElementById("controls"), "label", { class: "quiet" });
  const box = element(label, "input", { type: "checkbox", id: "details" });
  label.append(" Show what changed in each task: flips, p, and LLM-KICK's matching");
  const headers = [...table.querySelectorAll(".group th")].map((header) => ({ header, full: header.colSpan }));
  const update = () => {
    table.classList.toggle("brief", !box.checked);
    for (const { header, full } of headers) header.colSpan = box.checked ? full : Number(header.dataset.brief);
  };
  box.addEventListener("change", update);
  update();
}

const table = document.querySelector("table");
makeSortable(table);
makeDetails(table);
plots.forEach(makePlot);
