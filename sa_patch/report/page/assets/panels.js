"use strict";

// The charts on the page: one panel per task and column, drawn when it comes into sight.

const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  toImageButtonOptions: { format: "svg", filename: "sa_patch" },
};
const waiting = new Map();
const sight = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((e) => draw(e.target)),
  { rootMargin: "300px" },
);

function draw(chart) {
  const panel = waiting.get(chart);
  if (!panel || !window.Plotly) return;
  waiting.delete(chart);
  sight.unobserve(chart);
  const { traces, layout } = figureOf(panel.points, panel.axis, panel.range);
  Plotly.newPlot(chart, traces, layout, { ...CONFIG, responsive: !printing });
  chart.on("plotly_click", (event) => {
    const trace = chart.data[event.points[0].curveNumber];
    if (trace.rows) openDetails(trace.rows[event.points[0].pointNumber].point);
  });
  chart.dataset.drawn = "yes";
}

function drawAll() {
  [...waiting.keys()].forEach(draw);
}

// One after the other while nothing else is to do, so that scrolling never waits.
function drawRest() {
  const next = waiting.keys().next();
  if (next.done || !window.Plotly) return;
  draw(next.value);
  (window.requestIdleCallback || setTimeout)(drawRest);
}

// Called once plotly's code is there, which comes last, so that all else can be read before it.
function startDrawing() {
  for (const chart of waiting.keys()) {
    sight.unobserve(chart);
    sight.observe(chart);
  }
  (window.requestIdleCallback || setTimeout)(drawRest);
}

function showPanels(columns) {
  const holder = document.getElementById("panels");
  for (const chart of holder.querySelectorAll(".chart")) {
    sight.unobserve(chart);
    if (chart.dataset.drawn) Plotly.purge(chart);
  }
  waiting.clear();
  holder.replaceChildren();
  const axis = axisShown();
  const several = columns.length > 1;
  holder.style.gridTemplateColumns = several
    ? `repeat(${columns.length}, minmax(min(85vw, 20rem), 1fr))`
    : "";
  for (const task of TASKS.filter((_, index) => state.tasks.has(index))) {
    const ofTask = columns.map((column) => column.points.filter((point) => point.task === task));
    if (!ofTask.some((points) => points.length)) continue;
    const range = sharedRange(ofTask.flat());
    columns.forEach((column, index) => holder.append(panelOf(task, column, ofTask[index], axis, range)));
  }
  document.getElementById("empty").hidden = holder.childElementCount > 0;
  (window.requestIdleCallback || setTimeout)(drawRest);
}

function panelOf(task, column, points, axis, range) {
  const panel = document.createElement("div");
  panel.className = "panel";
  const heading = document.createElement("h3");
  heading.textContent = taskName(task, points) + (column.name === null ? "" : ` · ${column.name}`);
  panel.append(heading);
  if (!points.length) {
    panel.append("No result here.");
    return panel;
  }
  const items = document.createElement("small");
  items.textContent = points[0].samples === null ? "" : ` ${plain(points[0].samples)} items`;
  heading.append(items);
  const chart = document.createElement("div");
  chart.className = "chart";
  chart.tabIndex = 0;
  chart.setAttribute("role", "group");
  chart.setAttribute(
    "aria-label",
    `Chart of ${heading.textContent}. Left and right go along a curve, up and down to another ` +
      "one, Enter tells all of a point. The table has the same figures.",
  );
  chart.addEventListener("keydown", (event) => walk(chart, event));
  chart.addEventListener("blur", () => chart.dataset.drawn && Plotly.Fx.unhover(chart));
  panel.append(chart);
  waiting.set(chart, { points, axis, range });
  sight.observe(chart);
  return panel;
}

// Arrow keys move from point to point, Enter opens the one that was reached.
function walk(chart, event) {
  draw(chart);
  const curves = chart.data.flatMap((trace, curve) =>
    trace.kind === "points" || (trace.kind === "across" && !hasPlace(chart, trace)) ? [curve] : [],
  );
  const at = chart.walked;
  if (event.key === "Enter" && at) {
    openDetails(chart.data[curves[at.curve]].rows[at.row].point);
    event.preventDefault();
    return;
  }
  const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!step || !curves.length) return;
  event.preventDefault();
  const curve = at ? (at.curve + step[0] + curves.length) % curves.length : 0;
  const trace = chart.data[curves[curve]];
  const last = trace.kind === "across" ? 0 : trace.rows.length - 1;
  const row = Math.min(Math.max(at ? at.row + step[1] : 0, 0), last);
  chart.walked = { curve, row };
  Plotly.Fx.hover(chart, [{ curveNumber: curves[curve], pointNumber: row }]);
  say(spoken(trace.rows[row].point));
}

// Whether a line across the panel has a mark of its own as well.
function hasPlace(chart, across) {
  return chart.data.some((one) => one.kind === "points" && one.rows[0].point === across.rows[0].point);
}

addEventListener("beforeprint", () => {
  printing = true;
  drawAll();
  redraw();
});
addEventListener("afterprint", () => {
  printing = false;
  redraw();
});
darkScheme.addEventListener("change", redraw);

// New colours for what is drawn; what is not takes them when it is.
function redraw() {
  const columns = columnsShown();
  showLegend(columns);
  showChoices();
  showPanels(columns);
  if (printing) drawAll();
}
