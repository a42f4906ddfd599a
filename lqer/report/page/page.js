"use strict";
// Draws the charts in the reader's colours, sorts and filters the tables, and tells of the point that was chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const narrow = window.matchMedia("(max-width: 640px)");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const MOST_COLUMNS = 6;
let model = null; // of the chosen measure: the only one whose runs are listed
const drawn = new Map(); // element id -> the chart it shows, as it was written

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(name).trim();
}

// A copy of a chart with the colours of the page in place of "var(--ink)" and so on.
function coloured(value, colour) {
  if (typeof value === "string") {
    const name = /^var\((--\w+)\)$/.exec(value);
    return name ? colour(name[1]) : value;
  }
  if (Array.isArray(value)) return value.map((item) => coloured(item, colour));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, colour)]));
}

function draw(id, chart) {
  drawn.set(id, chart);
  const shown = coloured(chart, colours());
  // Where a finger scrolls the page, it must not zoom the chart.
  shown.layout.dragmode = narrow.matches ? false : "zoom";
  if (narrow.matches) {
    for (const trace of shown.data) {
      if (trace.meta) trace.hovertext = trace.meta;
      // Names beside points have no room.
      if (trace.mode === "markers+text") trace.mode = "markers";
    }
  }
  return Plotly.react(id, shown.data, shown.layout, { responsive: true, displayModeBar: false });
}

function redraw() {
  for (const [id, chart] of drawn) draw(id, chart);
}

function line(list, name, text, kind) {
  const term = document.createElement("dt");
  const description = document.createElement("dd");
  term.textContent = name;
  if (kind) {
    const code = document.createElement(kind);
    code.className = "command";
    code.textContent = text;
    description.append(code);
  } else {
    description.textContent = text;
  }
  list.append(term, description);
}

function select(index) {
  const one = data.candidates[index];
  const list = document.createElement("dl");
  line(list, "scheme", one.scheme);
  line(list, "run", one.tag);
  line(list, "model", one.model);
  line(list, "weights, activations, rank", `${one.weight}, ${one.activation}, ${one.rank}`);
  line(list, "bits", `${one.bits.toFixed(4)} = ${one.parts.map(([name, bits]) => `${bits.toFixed(4)} ${name}`).join(" + ")}`);
  if (one.size !== null) line(list, "size of the checkpoint", `${one.size.toPrecision(4)} GB`);
  line(list, "to repeat it", one.command, "code");
  one.values.forEach((value, measure) => {
    if (value !== null) line(list, data.measures[measure].title, Number(value.toPrecision(6)).toString());
  });
  document.getElementById("selected").replaceChildren(list);
  for (const row of document.querySelectorAll("#runs tbody tr")) {
    row.classList.toggle("marked", row.dataset.candidate === String(index));
  }
}

// The measures that a wide screen has columns for: all of the model, or those of the same quantity where they are many.
function columns(index) {
  const chosen = data.measures[index];
  const places = [...data.measures.keys()].filter((place) => data.measures[place].model === chosen.model);
  if (places.length <= MOST_COLUMNS) return new Set(places);
  return new Set(places.filter((place) => data.measures[place].quantity === chosen.quantity));
}

function showMeasure(index) {
  document.getElementById("direction").textContent =
    `${data.measures[index].lower ? "Lower" : "Higher"} is better. Open markers: activations are quantized too. Faint: dominated by another scheme.`;
  const shown = columns(index);
  for (const cell of document.querySelectorAll("#runs .measure")) {
    cell.classList.toggle("chosen", cell.dataset.measure === String(index));
    cell.classList.toggle("near", shown.has(Number(cell.dataset.measure)));
  }
  model = data.measures[index].model;
  filter(document.getElementById("runs"));
  const cost = document.getElementById("cost");
  return draw("pareto", data.pareto[index][cost ? Number(cost.value) : 0]);
}

// Numbers by size, words by the alphabet; what is missing comes last either way.
function compare(a, b) {
  if (a === "" || b === "") return 0;
  const difference = Number(a) - Number(b);
  return Number.isNaN(difference) ? a.localeCompare(b, undefined, { numeric: true }) : difference;
}

function sortBy(table, header) {
  const column = [...header.parentNode.children].indexOf(header);
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => row.children[column].dataset.sort ?? row.children[column].textContent.trim();
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const missing = (key(a) === "") - (key(b) === "");
    return missing || (descending ? -1 : 1) * compare(key(a), key(b));
  });
  table.tBodies[0].append(...rows);
}

// Shows the rows that are of the chosen model and have every word of the table's field, if it has one.
function filter(table) {
  const field = document.querySelector(`[data-filters="${table.id}"]`);
  const words = (field ? field.value : "").toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...table.tBodies[0].rows];
  const offered = rows.filter((row) => model === null || !row.dataset.model || row.dataset.model === model);
  for (const row of rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !offered.includes(row) || !words.every((word) => content.includes(word));
  }
  const count = document.querySelector(`[data-counts="${table.id}"]`);
  if (count) count.textContent = `${rows.filter((row) => !row.hidden).length} of ${offered.length}`;
}

for (const table of document.querySelectorAll("table")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header));
  }
  const field = document.querySelector(`[data-filters="${table.id}"]`);
  if (field) field.addEventListener("input", () => filter(table));
  filter(table);
}

if (data.measures.length) {
  const measure = document.getElementById("measure");
  measure.addEventListener("change", () => showMeasure(Number(measure.value)));
  showMeasure(Number(measure.value)).then((chart) => {
    chart.on("plotly_click", (event) => select(event.points[0].customdata));
  });
  const cost = document.getElementById("cost");
  if (cost) cost.addEventListener("change", () => showMeasure(Number(measure.value)));
  for (const row of document.querySelectorAll("#runs tbody tr")) {
    row.addEventListener("click", () => select(Number(row.dataset.candidate)));
  }
}

for (const section of data.sections) {
  draw(section.id, section.charts[0]);
  const choice = document.querySelector(`[data-chart="${section.id}"]`);
  if (choice) choice.addEventListener("change", () => draw(section.id, section.charts[Number(choice.value)]));
}

dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
