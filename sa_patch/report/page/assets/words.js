"use strict";

// Numbers and sentences about a point.

function plain(value) {
  if (value === null) return "–";
  if (value >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

function percent(share) {
  return share === null ? "–" : (100 * share).toFixed(1);
}

function score(point) {
  return point.accuracy ? percent(point.value) : plain(point.value);
}

function errorText(point) {
  if (point.error === null) return "–";
  return point.accuracy ? percent(point.error) : plain(point.error);
}

function metricName(point) {
  const metric = point.metric.split(",")[0];
  if (point.accuracy) return point.task === DATA.average ? "accuracy, %" : metric + ", %";
  return point.higher ? metric : metric + " (lower is better)";
}

function taskName(task, points) {
  if (task !== DATA.average) return task;
  const count = DATA.views[0].averaged.length;
  return points.length && count > 1 ? `average over ${count} tasks` : "average";
}

function methodName(point) {
  const label = DATA.series[point.series].label;
  return point.window === null ? label : `${label}, window ${point.window}`;
}

function scoreWithError(point) {
  const unit = point.accuracy ? "%" : "";
  const error = point.error === null ? "" : ` ± ${errorText(point)}`;
  return `${score(point)}${error}${unit && " " + unit}`;
}

function saturation(point) {
  if (!point.saturated) return "";
  const share = Math.round(100 * point.saturated_fraction);
  return (
    `Saturated: in ${share}% of the sequences the pattern left nothing out, so it was full ` +
    "attention there, and this point says little about sparsity."
  );
}

// Name and value of all that was measured at a point.
function facts(point) {
  const rows = [
    [metricName(point), scoreWithError(point)],
    ["pattern", point.pattern],
    ["model", point.model],
    ["keys per query, mean", plain(point.mean_keys)],
    ["keys of the last query", plain(point.last_query_keys)],
    ["tokens of a prompt, mean", plain(point.prompt_mean)],
    ["attention FLOPs, % of full", percent(point.flops_share)],
    ["keys that a tile reads, % of full", percent(point.visited_share)],
    ["attention FLOPs per sequence", point.flops === null ? "–" : point.flops.toExponential(2)],
    ["seconds per sequence", plain(point.seconds)],
    ["saturated sequences, %", percent(point.saturated_fraction)],
    ["seeds", point.seeds.join(", ") || "none (not random)"],
    ["items", plain(point.samples)],
  ];
  if (point.chance !== null) rows.push(["by chance, %", percent(point.chance)]);
  if (point.by_depth.length) {
    const depths = point.by_depth.map(([depth, value]) => `${depth}: ${percent(value)}`);
    rows.push(["accuracy by depth of the needle, %", depths.join(", ")]);
  }
  return rows;
}

// In one sentence, for whoever listens.
function spoken(point) {
  const cost = `${plain(point.mean_keys)} keys per query`;
  return `${methodName(point)}: ${scoreWithError(point)}, ${cost}. ${saturation(point)}`;
}

function escaped(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function hoverText(point) {
  const lines = [
    `<b>${escaped(methodName(point))}</b>`,
    `${escaped(metricName(point))}: ${scoreWithError(point)}`,
    `${plain(point.mean_keys)} keys per query, ${percent(point.flops_share)}% of full FLOPs`,
  ];
  if (point.seconds !== null) lines.push(`${plain(point.seconds)} s per sequence`);
  if (point.saturated) {
    const share = Math.round(100 * point.saturated_fraction);
    lines.push(`<i>saturated: full attention in ${share}% of the sequences,</i>`);
    lines.push("<i>so it says little about sparsity</i>");
  }
  return lines.join("<br>");
}

async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Older browsers forbid it for pages from disk; this way works there.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

async function copyCommand(point, button) {
  const done = await copyText(DATA.commands[point.command]);
  const before = button.dataset.label || button.textContent;
  button.dataset.label = before;
  button.textContent = done ? "Copied" : "Not copied: select it by hand";
  say(done ? "The command was copied." : "The command could not be copied.");
  setTimeout(() => (button.textContent = before), 2000);
}

function say(text) {
  document.getElementById("live").textContent = text;
}
