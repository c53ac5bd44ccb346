"use strict";

// Draws the page's charts from the JSON at its end, in the colors of the stylesheet, and again when the theme changes.
const { figures, names } = JSON.parse(document.getElementById("figures").textContent);

// Plotly reads a subset of HTML in what it shows.
const literal = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
for (const { data } of Object.values(figures)) {
  for (const trace of data) trace.customdata &&= trace.customdata.map((id) => literal(names[id])); // class ids, as names
}

function template() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), tickfont: { color: color("--muted") },
    title: { font: { color: color("--muted") }, standoff: 8 }, automargin: true, fixedrange: true,
  };
  return {
    layout: {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      colorway: [color("--series-1"), color("--series-2"), color("--series-3")],
      margin: { l: 8, r: 12, t: 10, b: 8 }, xaxis: axis, yaxis: axis, dragmode: false,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    },
  };
}

function draw() {
  const shared = template();
  for (const place of document.querySelectorAll("[data-figure]")) {
    const figure = figures[place.dataset.figure];
    const layout = { ...figure.layout, template: shared, showlegend: figure.data.length > 1 };
    Plotly.react(place, figure.data, layout, { displayModeBar: false, responsive: true });
  }
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
