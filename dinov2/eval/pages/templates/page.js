"use strict";
// Colour scheme, folded parts in print, and charts.
(() => {
  const root = document.documentElement, button = document.getElementById("theme"), key = "dinov2-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const storage = (use) => {
    try { return use(window.localStorage); } catch { return null; } // browsers may refuse it to files from disk
  };
  const show = (theme) => {
    if (theme) root.dataset.theme = theme;
    button.textContent = isDark() ? "Light colours" : "Dark colours";
  };
  button.addEventListener("click", () => {
    show(isDark() ? "light" : "dark");
    storage((items) => items.setItem(key, root.dataset.theme));
  });
  system.addEventListener("change", () => show());
  show(storage((items) => items.getItem(key)));
  root.dataset.scripted = "";

  let folded = [];
  const setOpen = (open) => folded.forEach((part) => { part.open = open; });
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    setOpen(true);
  });
  window.addEventListener("afterprint", () => setOpen(false));

  root.dataset.charts = "pending";
  const charts = [...document.querySelectorAll(".chart-data")];
  Promise.all(charts.map((chart) => Bokeh.embed.embed_item(JSON.parse(chart.textContent)))).then(() => {
    root.dataset.charts = "ready";
    document.dispatchEvent(new CustomEvent("chartsready"));
  });
})();
