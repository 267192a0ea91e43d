"use strict";

// The form, and the marks that tell the methods apart.

const MARK_SHAPES = {
  circle: "M12 3a5 5 0 1 0 .01 0Z", square: "M8 4h8v8h-8Z", diamond: "M12 2l6 6-6 6-6-6Z",
  "diamond-tall": "M12 1l4 7-4 7-4-7Z", "triangle-up": "M12 2l6 11h-12Z",
  "triangle-down": "M12 14l6-11h-12Z", "triangle-right": "M18 8l-11 6v-12Z",
  "triangle-left": "M6 8l11 6v-12Z", pentagon: "M12 2l6 4.5-2.3 7h-7.4l-2.3-7Z",
  cross: "M10 2h4v4h4v4h-4v4h-4v-4h-4v-4h4Z", hexagon: "M12 2l5 3v6l-5 3-5-3v-6Z",
  x: "M8 2l4 4 4-4 2 2-4 4 4 4-2 2-4-4-4 4-2-2 4-4-4-4Z",
  octagon: "M9.8 2.5h4.4l3.3 3.3v4.4l-3.3 3.3h-4.4l-3.3-3.3v-4.4Z",
  star: "M12 1l1.8 4.6 5 .3-3.9 3.1 1.3 4.8-4.2-2.7-4.2 2.7 1.3-4.8-3.9-3.1 5-.3Z",
};
const SVG = "http://www.w3.org/2000/svg";
const DASH_LENGTHS = { solid: "", dot: "2 3", dashdot: "6 3 1.5 3" };

function markOf(series, hollow = false) {
  const look = series === null ? { symbol: "circle", dash: null } : DATA.series[series];
  const colour = series === null ? "currentColor" : colourOf(series);
  const mark = document.createElementNS(SVG, "svg");
  mark.setAttribute("class", "mark");
  mark.setAttribute("width", 30);
  mark.setAttribute("height", 16);
  mark.setAttribute("viewBox", "-3 0 30 16");
  mark.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", "M-3 8h30");
  line.setAttribute("stroke", colour);
  line.setAttribute("stroke-width", 2);
  line.setAttribute("stroke-dasharray", DASH_LENGTHS[look.dash] ?? (look.dash || "").replace(/px/g, ""));
  const shape = document.createElementNS(SVG, "path");
  shape.setAttribute("d", MARK_SHAPES[look.symbol]);
  shape.setAttribute("stroke", colour);
  shape.setAttribute("fill", hollow ? "none" : colour);
  if (look.dash !== null) mark.append(line);
  mark.append(shape);
  return mark;
}

function showLegend(columns) {
  const points = columns.flatMap((column) => column.points);
  const items = [...new Set(points.map((point) => point.series))].sort((a, b) => a - b).map((series) => {
    const item = document.createElement("li");
    item.append(markOf(series), DATA.series[series].label);
    return item;
  });
  if (points.some((point) => point.saturated)) {
    const item = document.createElement("li");
    item.append(markOf(null, true), "hollow: saturated, in truth full attention");
    items.push(item);
  }
  document.getElementById("legend").replaceChildren(...items);
}

function choices(id, names, marks) {
  const set = document.getElementById(id);
  set.querySelectorAll(":scope > :not(legend)").forEach((old) => old.remove());
  const row = document.createElement("div");
  row.className = "all";
  for (const [text, all] of [["all", true], ["none", false]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", `${text} of: ${set.querySelector("legend").textContent}`);
    button.addEventListener("click", () => {
      state[id] = new Set(all ? names.keys() : []);
      update();
    });
    row.append(button);
  }
  if (names.length > 2) set.append(row);
  names.forEach((name, index) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = state[id].has(index);
    box.value = index;
    box.addEventListener("change", () => {
      if (box.checked) state[id].add(index);
      else state[id].delete(index);
      update();
    });
    label.append(box, ...(marks ? [markOf(index)] : []), name);
    set.append(label);
  });
}

function showChoices() {
  const focused = document.activeElement;
  const held = focused && focused.closest("fieldset");
  const [id, value, text] = [held && held.id, focused && focused.value, focused && focused.textContent];
  choices("tasks", TASKS.map((task) => (task === DATA.average ? taskName(task, [1]) : task)), false);
  choices("series", DATA.series.map((one) => one.label), true);
  choices("models", DATA.models, false);
  choices("runs", DATA.runs.map((run) => run.name), false);
  document.getElementById("models").hidden = DATA.models.length < 2;
  document.getElementById("runs").hidden = state.columns !== "runs";
  document.getElementById("axis").value = axisShown();
  document.getElementById("bands").checked = state.bands;
  for (const name of ["view", "columns"]) {
    document.querySelector(`input[name=${name}][value=${state[name]}]`).checked = true;
  }
  // Keyboard users stay where they were, although the boxes are new.
  if (["tasks", "series", "models", "runs"].includes(id)) {
    const again = [...document.getElementById(id).querySelectorAll("input, button")].find((one) =>
      focused.matches("input") ? one.value === value : one.textContent === text,
    );
    if (again) again.focus();
  }
}

function setUpControls() {
  const axis = document.getElementById("axis");
  for (const name of AXES) axis.append(new Option(DATA.axes[name], name));
  axis.addEventListener("change", () => {
    state.x = axis.value;
    update();
  });
  document.getElementById("bands").addEventListener("change", (event) => {
    state.bands = event.target.checked;
    update();
  });
  for (const name of ["view", "columns"]) {
    for (const radio of document.querySelectorAll(`input[name=${name}]`)) {
      radio.addEventListener("change", () => {
        state[name] = radio.value;
        update();
      });
    }
  }
  document.querySelector("input[value=pareto]").disabled = !costAxis();
  document.querySelector(".if-runs").hidden = DATA.runs.length < 2;
  document.querySelector(".if-models").hidden = DATA.models.length < 2;
  document.getElementById("columns").hidden = DATA.runs.length < 2 && DATA.models.length < 2;
  document.getElementById("reset").addEventListener("click", () => {
    state = everything();
    update();
  });
  // On a narrow screen the charts come first.
  if (matchMedia("(max-width: 60rem)").matches) document.getElementById("fold").open = false;
}
