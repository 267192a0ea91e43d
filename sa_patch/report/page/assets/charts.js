"use strict";

// From the points of a panel to plotly's traces and layout.

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

function isDark() {
  return darkScheme.matches && !printing;
}

function colourOf(series) {
  return isDark() ? DATA.series[series].dark : DATA.series[series].light;
}

function transparent(colour, opacity) {
  const parts = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  return `rgba(${parts.join(",")},${opacity})`;
}

function drawn(point) {
  const scale = point.accuracy ? 100 : 1;
  return { y: scale * point.value, error: scale * (point.error ?? 0) };
}

// The points of each series in order of their windows, as in the other figures. One without a
// window, as full attention always is, is drawn as a line across the panel.
function curvesOf(points, axis) {
  const found = new Map();
  for (const point of points) {
    if (!found.has(point.series)) found.set(point.series, { series: point.series, rows: [] });
    found.get(point.series).rows.push({ point, x: place(point, axis), ...drawn(point) });
  }
  const curves = [...found.values()];
  for (const curve of curves) {
    curve.across = curve.rows.length === 1 && curve.rows[0].point.window === null;
    curve.rows = curve.rows.filter((row) => curve.across || row.x !== null);
    curve.rows.sort((a, b) => a.point.window - b.point.window || a.x - b.x);
    // A band is a band only where the curve never turns back.
    const onwards = curve.rows.every((row, i) => i === 0 || row.x > curve.rows[i - 1].x);
    curve.banded = curve.across || (curve.rows.length > 1 && onwards);
  }
  return curves.filter((curve) => curve.rows.length);
}

// The points that no other beats: cheaper or equal, and better or equal; in order of cost.
function frontier(rows, higher) {
  const sign = higher ? 1 : -1;
  const best = [];
  const ordered = [...rows].sort((a, b) => a.x - b.x || sign * (b.y - a.y));
  for (const row of ordered) {
    if (!best.length || sign * row.y > sign * best[best.length - 1].y) best.push(row);
  }
  return best;
}

function rangeOf(curves) {
  const places = curves.flatMap((curve) => curve.rows.map((row) => row.x)).filter((x) => x > 0);
  if (!places.length) return [0.5, 2];
  const [low, high] = [Math.min(...places), Math.max(...places)];
  const margin = Math.max((high / low) ** 0.06, 1.15);
  return [low / margin, high * margin];
}

function roundTicks(low, high) {
  for (const steps of [[1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      ticks.push(...steps.map((step) => step * 10 ** power));
    }
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    if (inside.length <= 7) return inside;
  }
  return [low, high];
}

// Where many bands lie on each other each is fainter, so that together they never hide the lines.
function bandTrace(curve, range, bands) {
  const rows = curve.across
    ? range.map((x) => ({ ...curve.rows[0], x }))
    : curve.rows.filter((row) => row.x !== null);
  const opacity = (curve.across ? 0.1 : 0.16) * Math.min(1, 4 / bands);
  const colour = transparent(colourOf(curve.series), opacity);
  const floor = (row) => Math.max(row.y - row.error, curve.rows[0].point.higher ? -1e9 : row.y / 50);
  return {
    kind: "band",
    x: [...rows.map((row) => row.x), ...rows.map((row) => row.x).reverse()],
    y: [...rows.map((row) => row.y + row.error), ...rows.map(floor).reverse()],
    type: "scatter", mode: "lines", fill: "toself", fillcolor: colour,
    line: { width: 0, simplify: false }, hoverinfo: "skip", showlegend: false,
  };
}

function pointTrace(curve, range, pareto) {
  const look = DATA.series[curve.series];
  const colour = colourOf(curve.series);
  const rows = curve.rows.filter((row) => row.x !== null);
  const trace = {
    kind: "points",
    x: rows.map((row) => row.x),
    y: rows.map((row) => row.y),
    text: rows.map((row) => hoverText(row.point)),
    rows,
    name: escaped(look.label),
    type: "scatter",
    mode: "lines+markers",
    hovertemplate: "%{text}<extra></extra>",
    opacity: 1,
    line: { color: transparent(colour, pareto ? 0.45 : 1), width: pareto ? 1 : 2, dash: look.dash },
    marker: {
      color: colour,
      size: look.full ? 14 : 9,
      line: { color: colour, width: 1.5 },
      symbol: rows.map((row) => look.symbol + (row.point.saturated ? "-open" : "")),
    },
  };
  if (state.bands && (pareto || !curve.banded) && !look.full) {
    const array = rows.map((row) => row.error);
    trace.error_y = { type: "data", array, color: transparent(colour, 0.5), thickness: 1, width: 3 };
  }
  return trace;
}

// Full attention, or another pattern without a window: the same score whatever the axis says.
function acrossTrace(curve, range) {
  const row = curve.rows[0];
  // Enough places that pointing anywhere on the line finds one.
  const steps = [...Array(25).keys()].map((i) => range[0] * (range[1] / range[0]) ** (i / 24));
  return {
    kind: "across",
    x: steps,
    y: steps.map(() => row.y),
    text: steps.map(() => hoverText(row.point)),
    rows: steps.map(() => row),
    name: escaped(DATA.series[curve.series].label),
    type: "scatter",
    mode: "lines",
    hovertemplate: "%{text}<extra></extra>",
    line: { color: colourOf(curve.series), width: 2, dash: DATA.series[curve.series].dash },
  };
}

function levelTrace(value, range, name, look) {
  return {
    kind: "level", x: range, y: [value, value], name, type: "scatter", mode: "lines",
    hovertemplate: `${name}: %{y:.1f}<extra></extra>`, line: look,
  };
}

function figureOf(points, axis, yRange) {
  const curves = curvesOf(points, axis);
  const range = rangeOf(curves);
  const pareto = state.view === "pareto";
  const first = points[0];
  const traces = [];
  if (first.chance !== null && first.higher) {
    const look = { color: "#8c8c8c", width: 1.5, dash: "dot" };
    traces.push(levelTrace(100 * first.chance, range, "by chance", look));
  }
  for (const curve of curves) {
    if (state.bands && curve.banded && !(pareto && !curve.across)) traces.push(bandTrace(curve, range, curves.length));
  }
  if (pareto) {
    const rows = curves.filter((one) => !FULL_SERIES[one.series]).flatMap((one) => one.rows);
    const best = frontier(rows.filter((row) => row.x !== null), first.higher);
    if (best.length) traces.push(frontierTrace(best, range[1]));
  }
  for (const curve of curves) {
    if (curve.across) traces.push(acrossTrace(curve, range));
    if (!curve.across || curve.rows[0].x !== null) traces.push(pointTrace(curve, range, pareto));
  }
  return { traces, layout: layoutOf(points, axis, range, yRange) };
}

function frontierTrace(best, end) {
  return {
    kind: "frontier",
    x: [...best.map((row) => row.x), end],
    y: [...best.map((row) => row.y), best[best.length - 1].y],
    name: "Pareto frontier", type: "scatter", mode: "lines", hoverinfo: "skip",
    line: { shape: "hv", width: 4, color: isDark() ? "rgba(230,232,235,.35)" : "rgba(64,64,64,.35)" },
  };
}

function layoutOf(points, axis, range, yRange) {
  const ink = isDark() ? "#e6e8eb" : "#1b1f24";
  const grid = isDark() ? "#30363d" : "#e6e6e6";
  const logarithmic = !points[0].higher && points.every((point) => point.value > 0);
  const windows = [...new Set(points.map((point) => point.window))].filter((one) => one !== null);
  const ticks = axis === "window" && windows.length < 9 ? windows : roundTicks(...range);
  const common = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, color: ink };
  const y = { ...common, title: { text: escaped(metricName(points[0])), font: { size: 12 } } };
  if (yRange) Object.assign(y, { range: yRange, autorange: false });
  if (logarithmic) {
    y.type = "log";
    const span = yRange ? yRange.map((power) => 10 ** power) : [1, 10];
    y.tickvals = roundTicks(...span);
    y.ticktext = y.tickvals.map(plain);
  }
  return {
    xaxis: {
      ...common, type: "log", range: range.map(Math.log10), tickvals: ticks, ticktext: ticks.map(plain),
      title: { text: escaped(DATA.axes[axis]), font: { size: 12 } },
    },
    yaxis: y,
    margin: { l: 50, r: 10, t: 8, b: 45 },
    showlegend: false,
    hovermode: "closest",
    // On a phone a finger scrolls the page; with a mouse a box zooms in.
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    font: { family: "system-ui, DejaVu Sans, sans-serif", size: 12, color: ink },
    hoverlabel: { align: "left", bgcolor: isDark() ? "#2a2f36" : "#ffffff", font: { color: ink } },
    // Paper has two charts in a row, whatever the screen had.
    ...(printing ? { width: 330, height: 240 } : {}),
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
  };
}

// The vertical range that all panels of a task share: at least 5 percentage points, so that a task
// on which all score alike is no place to zoom.
function sharedRange(points) {
  const rows = points.map(drawn);
  if (!rows.length) return null;
  let low = Math.min(...rows.map((row) => row.y - row.error));
  let high = Math.max(...rows.map((row) => row.y + row.error));
  if (!points[0].higher && points.every((point) => point.value > 0)) {
    low = Math.min(...rows.map((row) => Math.max(row.y - row.error, 0.7 * row.y)));
    const margin = Math.max((high / low) ** 0.06, 1.05);
    return [Math.log10(low / margin), Math.log10(high * margin)];
  }
  const chance = points[0].chance;
  if (chance !== null && points[0].accuracy) low = Math.min(low, 100 * chance);
  const margin = Math.max(0.05 * (high - low), 0.5);
  [low, high] = [low - margin, high + margin];
  if (points[0].accuracy && high - low < 5) high = low + 5;
  return [low, high];
}
