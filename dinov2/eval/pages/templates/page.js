// Colour scheme, and charts.
const root = document.documentElement;
let storage = {};
try { storage = window.localStorage; } catch { /* browsers may refuse it to files from disk */ }
root.style.colorScheme = storage.dinov2Colours ?? "light dark"; // both: the system's choice
document.getElementById("theme").onclick = () => {
  const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  storage.dinov2Colours = (storage.dinov2Colours ?? system) === "dark" ? "light" : "dark";
  root.style.colorScheme = storage.dinov2Colours;
};

root.dataset.scripted = "";
root.dataset.charts = "pending";
const charts = [...document.querySelectorAll(".chart-data")];
Promise.all(charts.map((chart) => Bokeh.embed.embed_item(JSON.parse(chart.textContent)))).then(() => {
  root.dataset.charts = "ready";
  document.dispatchEvent(new CustomEvent("chartsready"));
});
