"use strict";
// The explorer: colours, filters, neighbours, selection and export. Text from files is set as text, never as HTML.
document.addEventListener("chartsready", () => {
  const part = (name) => document.querySelector(`.explorer [data-part="${name}"]`);
  const data = JSON.parse(part("data").textContent), plot = part("plot");
  const figure = Bokeh.documents.map((document) => document.get_model_by_name("explorer")).find(Boolean);
  const [cells, wheel, pan, lasso, links, images] = ["cells", "wheel", "pan", "lasso", "links", "images"].map(
    (name) => figure.document.get_model_by_name(name));
  const { filter } = cells.view, { selected } = cells.data_source;
  const all = [...data.paths.keys()], hidden = new Map(); // {column: group numbers that are filtered out}
  let [column] = data.columns, [projection] = data.projections, current = -1, walk = [];

  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const button = (content, onclick, properties) => make("button", { type: "button", onclick, ...properties }, content);
  const columnOf = (id) => data.columns.find((one) => one.id === id);
  const valueOf = (from, i) => (from ? from.values?.[i] ?? from.groups[from.codes[i]].name : "");
  const label = columnOf("label"), right = columnOf("right");
  const searched = ["label", "patient", "data_set", "prediction"].map(columnOf);
  const textsOf = (i) => [data.paths[i], ...searched.map((one) => valueOf(one, i))];
  const factsOf = (i) => {
    const columns = data.columns.filter((one) => one === column || !one.id.startsWith("p_"));
    const lines = columns.map((one) => [one.title, valueOf(one, i)]);
    lines.push(["Image", data.paths[i]], ["No image", data.missing[i] ?? ""]);
    return lines.filter(([, value]) => value !== "").map((line) => line.join(": ")).join("\n");
  };

  // Colours and filters
  const draw = () => {
    const groups = column.codes.map((code) => column.groups[code]);
    cells.data_source.data = {
      x: projection.x, y: projection.y, thumbnail: data.thumbnails, facts: all.map(factsOf),
      colour: groups.map((group) => group.colour), marker: groups.map((group) => group.marker),
    };
  };
  const applyFilters = () => {
    const query = part("search").value.trim().toLowerCase();
    filter.indices = all.filter((i) => [...hidden].every(([{ codes }, off]) => !off.has(codes[i]))
      && (!query || textsOf(i).some((text) => text.toLowerCase().includes(query))));
    const by = [...hidden].filter(([, off]) => off.size).map(([{ title }]) => title).join(", ");
    part("status").textContent = `${filter.indices.length} of ${all.length} cells shown${by && `, filtered by ${by}`}.`;
    showImages();
  };
  const showLegend = () => {
    const boxes = column.groups.map(() => make("input", { type: "checkbox" })), codes = [...boxes.keys()];
    const hide = (off) => {
      hidden.set(column, new Set(off));
      boxes.forEach((box, code) => { box.checked = !hidden.get(column).has(code); });
      applyFilters();
    };
    const items = column.groups.map(({ name, colour, sign, count }, code) => {
      boxes[code].onchange = () => hide(codes.filter((other) => !boxes[other].checked));
      const title = name || "not known", symbol = make("span", { style: `color: ${colour}`, ariaHidden: "true" }, sign);
      const text = make("label", {}, boxes[code], symbol, title, make("span", { className: "muted" }, count));
      const showOnly = () => hide(codes.filter((other) => other !== code));
      return make("li", {}, text, button("only", showOnly, { ariaLabel: `Show only ${title}` }));
    });
    part("legend-title").textContent = column.title;
    part("legend").replaceChildren(
      button("All", () => hide([])), button("None", () => hide(codes)), make("ul", {}, ...items));
    hide(hidden.get(column) ?? []);
  };

  // View: its middle, and the units a pixel, which are the same in both directions
  const setView = (x, y, scale) => [[figure.x_range, x, figure.inner_width], [figure.y_range, y, figure.inner_height]]
    .forEach(([range, middle, pixels]) => {
      range.setv({ start: middle - (pixels * scale) / 2, end: middle + (pixels * scale) / 2 });
    });
  const view = () => {
    const [[left, right], [bottom, top]] = [figure.x_range, figure.y_range].map(({ start, end }) => [start, end]);
    return [(left + right) / 2, (bottom + top) / 2, (right - left) / figure.inner_width];
  };
  const fit = () => {
    const [[left, right], [bottom, top]] = [projection.x, projection.y].map(
      (values) => [Math.min, Math.max].map((choose) => values.reduce((a, b) => choose(a, b))));
    const scale = Math.max((right - left) / figure.inner_width, (top - bottom) / figure.inner_height) / 0.9;
    setView((left + right) / 2, (bottom + top) / 2, scale || 0.01);
  };
  const move = (across, up, factor = 1) => {
    const [x, y, scale] = view();
    setView(x + across * scale, y + up * scale, scale / factor);
  };
  const isInView = (i) => [[figure.x_range, projection.x[i]], [figure.y_range, projection.y[i]]].every(
    ([{ start, end }, value]) => start <= value && value <= end);
  const showImages = () => {
    if (!part("near").checked && !images.data.x.length) return;
    const near = part("near").checked ? filter.indices.filter(isInView) : [], drawn = near.length <= 250 ? near : [];
    const [x, y, url] = [projection.x, projection.y, data.thumbnails].map((values) => drawn.map((i) => values[i]));
    images.data = { x, y, url, colour: drawn.map((i) => column.groups[column.codes[i]].colour) };
  };
  const showProjection = () => {
    [figure.below[0].axis_label, figure.left[0].axis_label] = projection.axes;
    draw();
    fit();
    goTo(current);
  };

  // One cell and its neighbours
  const imageOf = (i, size) => make("img", { src: data.thumbnails[i], width: size, height: size, alt: "" });
  const imageButton = (i, caption, className = "") => {
    const title = `${valueOf(label, i)}, ${data.paths[i]}`;
    const made = button(imageOf(i, 56), () => goTo(i), { title, ariaLabel: `${title} ${caption}`, className });
    made.dataset.row = data.rows[i];
    made.append(make("br"), caption);
    return made;
  };
  const imageList = (ariaLabel, buttons) =>
    make("div", { className: "explorer-images", role: "group", ariaLabel }, ...buttons);
  const goTo = (i) => {
    current = i;
    part("cell").dataset.row = data.rows[i] ?? "";
    const { x, y } = projection, near = data.neighbours[i] ?? [], ends = i < 0 ? [] : [i, ...near];
    links.data = {
      x0: ends.map(() => x[i]), y0: ends.map(() => y[i]), x1: ends.map((j) => x[j]), y1: ends.map((j) => y[j]),
    };
    if (i < 0) {
      part("cell").replaceChildren("Click a cell to see its nearest neighbours.");
      return;
    }
    if (!isInView(i)) setView(x[i], y[i], view()[2]);
    const isSame = (j) => label.codes[j] === label.codes[i];
    const buttons = near.map((j, rank) =>
      imageButton(j, `${data.distances[i][rank]} ${valueOf(label, j)}`, isSame(j) ? "" : "differs"));
    const summary = `${near.filter(isSame).length} of ${near.length} nearest neighbours are of the same class `
      + `(dashed: another). Below each: ${data.metric}.`;
    part("cell").replaceChildren(imageOf(i, 96), make("p", { className: "explorer-facts" }, factsOf(i)),
      make("p", { className: "muted" }, summary), imageList("Nearest neighbours", buttons));
  };
  const nearestShown = (x, y, accepts) => {
    const offset = (i) => [projection.x[i] - x, projection.y[i] - y], distance = (i) => Math.hypot(...offset(i));
    const accepted = filter.indices.filter((i) => accepts(...offset(i)));
    return accepted.reduce((best, i) => (best >= 0 && distance(best) <= distance(i) ? best : i), -1);
  };
  const step = (across, up) => {
    const isAhead = (dx, dy) => dx * across + dy * up > Math.abs(dx * up - dy * across); // within 45 degrees
    const [x, y] = current < 0 ? view() : [projection.x[current], projection.y[current]];
    const next = nearestShown(x, y, current < 0 ? () => true : isAhead);
    if (next >= 0) goTo(next);
  };
  const stepNeighbour = (by) => {
    if (walk[0] !== current) walk = [current, ...data.neighbours[current] ?? []];
    walk = [...walk.slice(by), ...walk.slice(0, by)];
    goTo(walk[0]);
  };

  // Selection and export
  const selection = () => [...selected.indices].sort((a, b) => data.rows[a] - data.rows[b]);
  const showSelection = () => {
    const chosen = selection(), percent = (of, n) => `${((100 * of) / n).toFixed(1)} %`;
    const classes = label.groups.map(({ name, count }, code) => {
      const own = chosen.filter((i) => label.codes[i] === code), n = own.length;
      const nRight = own.filter((i) => valueOf(right, i) === "right").length;
      const text = `${name}: ${n} (${percent(n, chosen.length)}), ${percent(n, count)} of its class`;
      return [n, right ? `${text}, ${nRight} right` : text];
    }).filter(([n]) => n).sort((a, b) => b[0] - a[0]);
    const sample = chosen.filter((_, i) => i % Math.ceil(chosen.length / 24) === 0);
    part("export").disabled = part("clear").disabled = !chosen.length;
    part("selection").textContent = chosen.length ? `${chosen.length} selected.` : "No cell is selected.";
    part("selected").replaceChildren(make("ul", {}, ...classes.map(([, text]) => make("li", {}, text))),
      imageList("Selected cells", sample.map((i) => imageButton(i, ""))));
  };
  const csvField = (text) => { // RFC 4180; an apostrophe stops spreadsheets from calculating formulas
    const safe = /^[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const download = () => {
    const rows = selection().map((i) => [data.rows[i], ...textsOf(i).map(csvField), projection.x[i], projection.y[i]]);
    const lines = ["index,path,label,patient,data_set,prediction,x,y", ...rows.map((row) => row.join(",")), ""];
    const file = new Blob(["\ufeff", lines.join("\r\n")], { type: "text/csv;charset=utf-8" }); // Excel needs the mark
    make("a", { href: URL.createObjectURL(file), download: "selected_cells.csv" }).click();
  };

  // Controls, keys and pointer
  const choose = (select, items, action) => {
    select.append(...items.map(({ title }, i) => make("option", { value: i }, title)));
    select.onchange = () => action(items[select.value]);
  };
  choose(part("projection"), data.projections, (choice) => { projection = choice; showProjection(); });
  choose(part("colour"), data.columns, (choice) => { column = choice; draw(); showLegend(); });
  part("search").oninput = applyFilters;
  part("near").onchange = showImages;
  part("fit").onclick = fit;
  part("select-shown").onclick = () => { selected.indices = filter.indices; };
  part("clear").onclick = () => { selected.indices = []; };
  part("export").onclick = download;
  const keys = {
    "+": () => move(0, 0, 1.3), "=": () => move(0, 0, 1.3), "-": () => move(0, 0, 1 / 1.3), 0: fit,
    n: () => stepNeighbour(1), p: () => stepNeighbour(-1), l: () => { (lasso.active ? pan : lasso).active = true; },
    " ": () => {
      const chosen = new Set(selected.indices);
      if (!chosen.delete(current)) chosen.add(current);
      selected.indices = [...chosen].filter((i) => i >= 0);
    },
    escape: () => goTo(-1),
  };
  plot.onkeydown = (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    const go = () => (event.shiftKey ? move(60 * arrow[0], 60 * arrow[1]) : step(...arrow));
    const action = arrow ? go : keys[event.key.toLowerCase()];
    if (!action || event.target !== plot || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  };
  plot.onfocus = () => { wheel.active = true; }; // a page that scrolls must not get stuck on the plot
  plot.onblur = () => { wheel.active = false; };
  plot.onclick = () => plot.focus({ preventScroll: true });
  const tap = ({ x, y }) => goTo(nearestShown(x, y, (dx, dy) => Math.hypot(dx, dy) <= 12 * view()[2]));
  figure.js_event_callbacks = { tap: [tap], doubletap: [tap] };
  selected.change.connect(showSelection);
  [figure.x_range, figure.y_range].forEach((range) => range.change.connect(showImages));
  figure.properties.inner_width.change.connect(() => setView(...view()));
  showLegend();
  showSelection();
  showProjection();
});
