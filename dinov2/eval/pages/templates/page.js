"use strict";
// Colour scheme, folded parts in print, and charts.
(() => {
  const root = document.documentElement, button = document.getElementById("theme"), key = "dinov2-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = isDark() ? "Light colours" : "Dark colours";
    document.dispatchEvent(new CustomEvent("themechange"));
  };
  const storage = (use) => {
    try { return use(window.localStorage); } catch { return null; } // browsers may refuse it to files from disk
  };
  const stored = storage((items) => items.getItem(key));
  if (stored) root.dataset.theme = stored;
  root.dataset.scripted = "";
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    storage((items) => items.setItem(key, root.dataset.theme));
    show();
  });
  system.addEventListener("change", show);
  show();

  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => { part.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));

  root.dataset.charts = "pending";
  const charts = [...document.querySelectorAll(".chart-data")];
  Promise.all(charts.map((chart) => Bokeh.embed.embed_item(JSON.parse(chart.textContent)))).then(() => {
    root.dataset.charts = "ready";
    document.dispatchEvent(new CustomEvent("chartsready"));
  });
})();
