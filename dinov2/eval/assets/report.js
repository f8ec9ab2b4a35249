"use strict";

// The frame of every page: colour scheme, and what folded parts do in print.
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const KEY = "dinov2-theme";

  // Browsers may refuse storage to files from disk; the choice then lasts as long as the page
  const stored = () => {
    try {
      return window.localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const store = (theme) => {
    try {
      window.localStorage.setItem(KEY, theme);
    } catch {
      // nothing depends on it
    }
  };

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = isDark() ? "Light colours" : "Dark colours";
    document.dispatchEvent(new CustomEvent("themechange"));
  };

  const chosen = stored();
  if (chosen === "dark" || chosen === "light") {
    root.dataset.theme = chosen;
  }
  root.dataset.scripted = "";
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();

  // Paper cannot be unfolded
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => part.setAttribute("open", ""));
  });
  window.addEventListener("afterprint", () => folded.forEach((part) => part.removeAttribute("open")));
})();
