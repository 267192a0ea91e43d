"use strict";

// What the page knows (see page_data.py) and what of it is shown.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COSTS = ["mean_keys", "flops", "visited", "seconds"];
const FULL_SERIES = DATA.series.map((one) => one.full);
const TASKS = (DATA.views[0].averaged.length > 1 ? [DATA.average] : []).concat(DATA.tasks);

// A point's place on an axis, in the axis' unit; null if it has none.
function place(point, axis) {
  const share = { flops: point.flops_share, visited: point.visited_share }[axis];
  if (share !== undefined) return share === null ? null : 100 * share;
  return axis === "window" ? point.window : point[axis];
}

function measured(axis) {
  return DATA.views[0].points.some((point) => place(point, axis) !== null);
}

const AXES = Object.keys(DATA.axes).filter(measured);

function everything() {
  return {
    view: "curves",
    x: AXES[0],
    bands: true,
    columns: "together",
    tasks: new Set(TASKS.keys()),
    series: new Set(DATA.series.keys()),
    models: new Set(DATA.models.keys()),
    runs: new Set(DATA.runs.keys()),
  };
}

let state = everything();

const CHOICES = ["tasks", "series", "models", "runs"];

// The address holds what differs from showing everything, so that a view can be sent to somebody.
function writeAddress() {
  const all = everything();
  const words = new URLSearchParams();
  for (const key of ["view", "x", "columns"]) {
    if (state[key] !== all[key]) words.set(key, state[key]);
  }
  if (!state.bands) words.set("bands", "no");
  for (const key of CHOICES) {
    if (state[key].size !== all[key].size) {
      words.set(key, [...state[key]].sort((a, b) => a - b).join("."));
    }
  }
  const text = words.toString();
  history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
}

function readAddress() {
  state = everything();
  const words = new URLSearchParams(location.hash.slice(1));
  if (words.get("view") === "pareto" && costAxis()) state.view = "pareto";
  if (AXES.includes(words.get("x"))) state.x = words.get("x");
  const columns = words.get("columns");
  if (columns === "runs" && DATA.runs.length > 1) state.columns = columns;
  if (columns === "models" && DATA.models.length > 1) state.columns = columns;
  state.bands = words.get("bands") !== "no";
  for (const key of CHOICES) {
    if (words.has(key)) {
      const listed = words.get(key).split(".").filter((text) => text !== "").map(Number);
      state[key] = new Set(listed.filter((index) => everything()[key].has(index)));
    }
  }
}

// The axis that is drawn: a window is no cost, so that the frontier takes the first cost there is.
function costAxis() {
  return COSTS.includes(state.x) ? state.x : COSTS.find((axis) => AXES.includes(axis));
}

function axisShown() {
  return state.view === "pareto" ? costAxis() : state.x;
}

function shownPoint(point) {
  return (
    state.tasks.has(TASKS.indexOf(point.task)) &&
    state.series.has(point.series) &&
    state.models.has(DATA.models.indexOf(point.model))
  );
}

// What stands side by side: a name (null if there is nothing to tell apart) and its points.
function columnsShown() {
  const together = DATA.views[0].points.filter(shownPoint);
  if (state.columns === "runs") {
    return [...state.runs].sort((a, b) => a - b).map((run) => ({
      name: DATA.runs[run].name,
      points: DATA.views[run + 1].points.filter(shownPoint),
    }));
  }
  if (state.columns === "models") {
    return [...state.models].sort((a, b) => a - b).map((model) => ({
      name: DATA.models[model],
      points: together.filter((point) => point.model === DATA.models[model]),
    }));
  }
  return [{ name: null, points: together }];
}
