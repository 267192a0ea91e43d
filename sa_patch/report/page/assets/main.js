"use strict";

// Words that never change, the window with a point's details, and the first drawing.

let inDetails = null;

function openDetails(point) {
  inDetails = point;
  document.getElementById("details-title").textContent = `${point.task}: ${methodName(point)}`;
  document.getElementById("details-saturated").textContent = saturation(point);
  fill("details-list", facts(point));
  document.getElementById("details-command").textContent = DATA.commands[point.command];
  const dialog = document.getElementById("details");
  dialog.returnTo = dialog.open ? dialog.returnTo : document.activeElement;
  if (!dialog.open) dialog.show();
  document.getElementById("details-close").focus({ preventScroll: true });
  dialog.scrollTop = 0;
}

function closeDetails() {
  const dialog = document.getElementById("details");
  if (!dialog.open) return;
  dialog.close();
  if (dialog.returnTo && dialog.returnTo.isConnected) dialog.returnTo.focus({ preventScroll: true });
}

function fill(id, pairs) {
  const rows = pairs.flatMap(([name, value]) => {
    const [term, said] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    said.textContent = value;
    return [term, said];
  });
  document.getElementById(id).replaceChildren(...rows);
}

function setUpWords() {
  document.getElementById("title").textContent = `Results: ${DATA.title}`;
  for (const text of DATA.warnings) {
    const line = document.createElement("p");
    line.className = "warning";
    line.textContent = text;
    document.getElementById("warnings").append(line);
  }
  for (const text of DATA.notes) {
    const item = document.createElement("li");
    item.textContent = text;
    document.getElementById("notes").append(item);
  }
  const holder = document.getElementById("provenance");
  const parts = [{ name: null, provenance: DATA.provenance }, ...DATA.runs];
  if (DATA.unused.length) {
    parts.push({ name: "Files that were not used", provenance: DATA.unused.map((text) => ["", text]) });
  }
  parts.forEach((part, index) => {
    if (part.name !== null) {
      const heading = document.createElement("h3");
      heading.textContent = part.name;
      holder.append(heading);
    }
    const list = document.createElement("dl");
    list.id = `provenance-${index}`;
    holder.append(list);
    fill(list.id, part.provenance);
  });
}

function update() {
  writeAddress();
  const columns = columnsShown();
  showChoices();
  showLegend(columns);
  showPanels(columns);
  showTable(columns);
}

document.getElementById("details-close").addEventListener("click", closeDetails);
document.getElementById("details-copy").addEventListener("click", (event) => copyCommand(inDetails, event.target));
addEventListener("keydown", (event) => event.key === "Escape" && closeDetails());
addEventListener("hashchange", () => {
  readAddress();
  update();
});
setUpWords();
setUpControls();
readAddress();
update();
