"use strict";

// The points as a table that can be sorted by any column.

const COLUMNS = [
  { name: "task", text: (row) => taskName(row.point.task, [row.point]), value: (row) => TASKS.indexOf(row.point.task) },
  { name: "run", text: (row) => row.column, value: (row) => row.column, shown: () => state.columns === "runs" },
  { name: "model", text: (row) => row.point.model, value: (row) => row.point.model, shown: () => DATA.models.length > 1 },
  { name: "method", wide: true, value: (row) => DATA.series[row.point.series].label },
  { name: "window", number: true, text: (row) => plain(row.point.window), value: (row) => row.point.window },
  {
    name: "score", number: true, value: (row) => (row.point.accuracy ? 100 : 1) * row.point.value,
    text: (row) => score(row.point) + (row.point.accuracy ? " %" : row.point.higher ? "" : " ↓") + (row.point.saturated ? " °" : ""),
  },
  { name: "± error", number: true, text: (row) => errorText(row.point), value: (row) => (row.point.error === null ? null : (row.point.accuracy ? 100 : 1) * row.point.error) },
  { name: "keys per query", number: true, text: (row) => plain(row.point.mean_keys), value: (row) => row.point.mean_keys },
  { name: "keys, last query", number: true, text: (row) => plain(row.point.last_query_keys), value: (row) => row.point.last_query_keys },
  { name: "read by a tile, % of full", number: true, text: (row) => percent(row.point.visited_share), value: (row) => row.point.visited_share },
  { name: "FLOPs, % of full", number: true, text: (row) => percent(row.point.flops_share), value: (row) => row.point.flops_share },
  { name: "s per sequence", number: true, text: (row) => plain(row.point.seconds), value: (row) => row.point.seconds, shown: () => measured("seconds") },
  { name: "saturated, %", number: true, text: (row) => percent(row.point.saturated_fraction), value: (row) => row.point.saturated_fraction },
  { name: "seeds", number: true, text: (row) => String(row.point.seeds.length || "–"), value: (row) => row.point.seeds.length || null },
  { name: "items", number: true, text: (row) => plain(row.point.samples), value: (row) => row.point.samples },
];
const sorting = { column: null, down: false };

function compareValues(a, b) {
  // What was not measured comes last, whichever way the rest is sorted.
  if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
  const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return sorting.down ? -order : order;
}

function showTable(columns) {
  const shown = COLUMNS.filter((column) => !column.shown || column.shown());
  const rows = columns.flatMap(({ name, points }) => points.map((point) => ({ point, column: name })));
  if (sorting.column) rows.sort((a, b) => compareValues(sorting.column.value(a), sorting.column.value(b)));
  const table = document.getElementById("table");
  table.tHead.replaceChildren(headOf(shown));
  const body = document.createDocumentFragment();
  rows.forEach((row) => body.append(rowOf(row, shown)));
  table.tBodies[0].replaceChildren(body);
}

function headOf(shown) {
  const head = document.createElement("tr");
  for (const column of shown) {
    const cell = document.createElement("th");
    cell.scope = "col";
    if (column.number) cell.className = "number";
    if (sorting.column === column) cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.name;
    button.addEventListener("click", () => {
      sorting.down = sorting.column === column ? !sorting.down : false;
      sorting.column = column;
      showTable(columnsShown());
      const place = [...document.getElementById("table").tHead.rows[0].cells].findIndex((th) => th.hasAttribute("aria-sort"));
      document.getElementById("table").tHead.rows[0].cells[place].firstChild.focus();
    });
    cell.append(button);
    head.append(cell);
  }
  const last = document.createElement("th");
  last.scope = "col";
  last.className = "command";
  last.textContent = "again";
  head.append(last);
  return head;
}

function rowOf(row, shown) {
  const line = document.createElement("tr");
  for (const column of shown) {
    const cell = document.createElement("td");
    if (column.number) cell.className = "number";
    if (column.wide) {
      cell.className = "wide";
      const pattern = document.createElement("code");
      pattern.textContent = row.point.pattern;
      cell.append(DATA.series[row.point.series].label, document.createElement("br"), pattern);
    } else {
      cell.textContent = column.text(row);
    }
    if (column.name === "score" && row.point.saturated) cell.title = saturation(row.point);
    line.append(cell);
  }
  const last = document.createElement("td");
  last.className = "command";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy command";
  button.setAttribute("aria-label", `Copy the command for ${row.point.task}, ${methodName(row.point)}`);
  button.addEventListener("click", () => copyCommand(row.point, button));
  last.append(button);
  line.append(last);
  return line;
}
