"use strict";

// The list of patients: order, filters, search.
(() => {
  const list = document.getElementById("patients-list");
  if (!list) {
    return;
  }
  const part = (name) => document.getElementById(`patients-${name}`);
  const [order, ofClass, search, wrongOnly, count] = ["order", "class", "search", "wrong", "count"].map(part);
  const cards = [...list.children].map((element) => ({
    element,
    name: element.dataset.name,
    isWrong: element.dataset.wrong === "1",
    probability: Number(element.dataset.probability),
    range: Number(element.dataset.range),
    classes: element.dataset.classes.split(" "),
  }));

  const byName = (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true });
  const ORDERS = {
    wrong: (a, b) => b.isWrong - a.isWrong || a.probability - b.probability,
    unsure: (a, b) => a.probability - b.probability,
    sure: (a, b) => b.probability - a.probability,
    range: (a, b) => b.range - a.range,
    name: byName,
  };

  const sort = () => {
    cards.sort((a, b) => ORDERS[order.value](a, b) || byName(a, b));
    list.append(...cards.map((card) => card.element));
  };

  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let nShown = 0;
    cards.forEach((card) => {
      const isShown =
        (!wrongOnly.checked || card.isWrong) &&
        (ofClass.value === "" || card.classes.includes(ofClass.value)) &&
        card.name.toLowerCase().includes(wanted);
      card.element.hidden = !isShown;
      nShown += Number(isShown);
    });
    count.textContent = `${nShown} of ${cards.length} shown`;
  };

  order.addEventListener("change", sort);
  ofClass.addEventListener("change", filter);
  wrongOnly.addEventListener("change", filter);
  search.addEventListener("input", filter);
  // Enter in the search field would load the page again
  part("controls").addEventListener("submit", (event) => event.preventDefault());
  // browsers keep what was chosen when a page is opened again
  sort();
  filter();
})();
