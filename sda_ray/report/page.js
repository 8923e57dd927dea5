"use strict";

// Figures, in the colours of the page

const specs = JSON.parse(document.getElementById("specs").textContent);

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axes(layout) {
  const found = {};

  for (const key of new Set(["xaxis", "yaxis", ...Object.keys(layout)])) {
    if (/^[xy]axis\d*$/.test(key)) {
      found[key] = { gridcolor: color("--line"), zerolinecolor: color("--line"), automargin: true,
        ...layout[key] };
    }
  }

  return found;
}

function themed(layout) {
  return {
    margin: { l: 60, r: 20, t: layout.showlegend ? 56 : 24, b: 50 }, ...layout, ...axes(layout), autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--ink"), family: "system-ui, sans-serif", size: 12 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", ...layout.legend },
  };
}

function drawAll() {
  for (const plot of document.querySelectorAll(".chart")) {
    const spec = specs[plot.dataset.group][plot.dataset.number];
    Plotly.react(plot, spec.data, themed(spec.layout), { responsive: true, displaylogo: false });

    if (spec.runs.length && !plot.dataset.brush) {
      plot.dataset.brush = "yes";
      plot.on("plotly_restyle", () => select(plot, spec));
    }
  }

  document.documentElement.dataset.drawn = document.querySelectorAll(".chart").length;
}

async function begin() {
  const packed = document.getElementById("library").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const program = document.createElement("script");
  program.textContent = await new Response(stream).text();
  document.head.append(program);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

// Tables

function show(table) {
  const words = table.filter.value.toLowerCase().split(/\s+/).filter(Boolean);

  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    const brushed = !table.chosen || table.chosen.has(Number(row.dataset.run));
    row.hidden = !brushed || !words.every((word) => text.includes(word));
  }

  const count = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
  table.count.textContent = `${count} of ${table.tBodies[0].rows.length} runs`;
}

function inside(value, range) {
  const ranges = Array.isArray(range[0]) ? range : [range];
  return ranges.some(([low, high]) => low <= value && value <= high);
}

function select(plot, spec) {
  const dimensions = plot.data[0].dimensions;
  const chosen = spec.runs.filter((_, i) =>
    dimensions.every((d) => !d.constraintrange || !d.constraintrange.length
      || inside(d.values[i], d.constraintrange)));
  const table = document.querySelector(`table.runs[data-group="${plot.dataset.group}"]`);
  table.chosen = chosen.length < spec.runs.length ? new Set(chosen) : null;
  show(table);
}

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const rows = [...table.tBodies[0].rows];
  const key = (row) => row.cells[column].dataset.key;

  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const [m, n] = [Number(x), Number(y)];
    return sign * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y) : m - n);
  });

  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.runs")) {
  const section = table.closest("section");
  table.filter = section.querySelector("input");
  table.count = section.querySelector(".count");
  table.filter.addEventListener("input", () => show(table));
  [...table.tHead.rows[0].cells].forEach((cell, i) =>
    cell.querySelector("button").addEventListener("click", () => sort(table, i)));
  show(table);
}

begin().catch((error) => {
  for (const plot of document.querySelectorAll(".chart")) plot.textContent = `No figure: ${error}`;
  throw error;
});
