"use strict";
// The explorer: colours, filters, neighbours, selection and export. Text from files is set as text, never as HTML.
document.addEventListener("chartsready", () => {
  const part = (name) => document.querySelector(`.explorer [data-part="${name}"]`);
  const data = JSON.parse(part("data").textContent), plot = part("plot");
  const figure = Bokeh.documents.map((document) => document.get_model_by_name("explorer")).find(Boolean);
  const [cells, wheel, pan, lasso, links] = ["cells", "wheel", "pan", "lasso", "links"].map(
    (name) => figure.document.get_model_by_name(name));
  const { filter } = cells.view, { selected } = cells.data_source, all = [...data.paths.keys()];
  let [column] = data.columns, [projection] = data.projections, current = -1;

  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const columnOf = (id) => data.columns.find((one) => one.id === id);
  const valueOf = (from, i) => (from ? from.values?.[i] ?? from.groups[from.codes[i]].name : "");
  const label = columnOf("label"), searched = ["label", "patient", "data_set", "prediction"].map(columnOf);
  const textsOf = (i) => [data.paths[i], ...searched.map((one) => valueOf(one, i))];
  const facts = all.map((i) => [
    ...data.columns.map((one) => [one.title, valueOf(one, i)]), ["Image", data.paths[i]], ["No image", data.missing[i]],
  ].filter(([, value]) => value).map((line) => line.join(": ")).join("\n"));

  // Colours and filters; a column's `ticked` has the numbers of the groups that alone are shown, none for all
  data.columns.forEach((one) => { one.ticked = new Set(); });
  const draw = () => {
    const [colour, marker] = ["colour", "marker"].map((name) => column.codes.map((code) => column.groups[code][name]));
    cells.data_source.data = { x: projection.x, y: projection.y, thumbnail: data.thumbnails, facts, colour, marker };
  };
  const applyFilters = () => {
    const query = part("search").value.trim().toLowerCase(), by = data.columns.filter(({ ticked }) => ticked.size);
    filter.indices = all.filter((i) => by.every(({ codes, ticked }) => ticked.has(codes[i]))
      && (!query || textsOf(i).some((text) => text.toLowerCase().includes(query))));
    const texts = [`${filter.indices.length} of ${all.length} cells`, ...by.map(({ title }) => `filtered by ${title}`)];
    part("status").textContent = texts.join(", ");
  };
  const showLegend = () => {
    part("legend-title").textContent = column.title;
    part("legend").replaceChildren(...column.groups.map(({ name, colour, sign, count }, code) => {
      const box = make("input", { type: "checkbox", checked: column.ticked.has(code) });
      box.onchange = () => { column.ticked[box.checked ? "add" : "delete"](code); applyFilters(); };
      const symbol = make("span", { style: `color: ${colour}`, ariaHidden: "true" }, sign);
      return make("label", {}, box, symbol, name || "not known", make("span", { className: "muted" }, count));
    }));
  };

  // View: its middle, and the units a pixel, which are the same in both directions
  const setView = (x, y, scale) => [[figure.x_range, x, figure.inner_width], [figure.y_range, y, figure.inner_height]]
    .forEach(([range, middle, pixels]) => {
      range.setv({ start: middle - (pixels * scale) / 2, end: middle + (pixels * scale) / 2 });
    });
  const view = () => {
    const { x_range: { start, end }, y_range } = figure;
    return [(start + end) / 2, (y_range.start + y_range.end) / 2, (end - start) / figure.inner_width];
  };
  const fit = () => {
    const [[left, right], [bottom, top]] = [projection.x, projection.y].map(
      (values) => [Math.min, Math.max].map((choose) => values.reduce((a, b) => choose(a, b))));
    const scale = Math.max((right - left) / figure.inner_width, (top - bottom) / figure.inner_height) / 0.9;
    setView((left + right) / 2, (bottom + top) / 2, scale || 0.01);
  };
  const zoom = (factor, [x, y, scale] = view()) => setView(x, y, scale / factor);

  // One cell and its neighbours
  const imageOf = (i, size) => make("img", { src: data.thumbnails[i], width: size, height: size, alt: "" });
  const imageButton = (i, caption, className = "") => {
    const title = `${valueOf(label, i)}, ${data.paths[i]}`, ariaLabel = `${title} ${caption}`;
    const made = make("button", { type: "button", title, ariaLabel, className }, imageOf(i, 56), make("br"), caption);
    made.onclick = () => goTo(i);
    made.dataset.row = data.rows[i];
    return made;
  };
  const images = (ariaLabel, made) => make("div", { className: "explorer-images", role: "group", ariaLabel }, ...made);
  const goTo = (i) => {
    current = i;
    part("cell").dataset.row = data.rows[i] ?? "";
    const { x, y } = projection, near = data.neighbours[i] ?? [], ends = i < 0 ? [] : [i, ...near];
    const [x0, y0] = [x, y].map((values) => ends.map(() => values[i]));
    links.data = { x0, y0, x1: ends.map((j) => x[j]), y1: ends.map((j) => y[j]) };
    if (i < 0) {
      part("cell").replaceChildren("Click a cell to see its nearest neighbours.");
      return;
    }
    const isOutside = ({ start, end }, value) => value < start || value > end;
    if (isOutside(figure.x_range, x[i]) || isOutside(figure.y_range, y[i])) setView(x[i], y[i], view()[2]);
    const isSame = (j) => label.codes[j] === label.codes[i];
    const buttons = near.map((j, rank) =>
      imageButton(j, `${data.distances[i][rank]} ${valueOf(label, j)}`, isSame(j) ? "" : "differs"));
    const summary = `${near.filter(isSame).length} of ${near.length} neighbours have the same class (dashed: another).`;
    part("cell").replaceChildren(imageOf(i, 96), make("p", { style: "white-space: pre-line" }, facts[i]),
      make("p", { className: "muted" }, summary), images("Nearest neighbours", buttons));
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

  // Selection and export
  const selection = () => [...selected.indices].sort((a, b) => data.rows[a] - data.rows[b]);
  const showSelection = () => {
    const chosen = selection();
    part("export").disabled = part("clear").disabled = !chosen.length;
    part("selection").textContent = chosen.length ? `${chosen.length} selected.` : "No cell is selected.";
    const sample = chosen.filter((_, i) => i % Math.ceil(chosen.length / 24) === 0);
    part("selected").replaceChildren(images("Selected cells", sample.map((i) => imageButton(i, ""))));
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
  const showProjection = () => {
    [figure.below[0].axis_label, figure.left[0].axis_label] = projection.axes;
    draw();
    fit();
    goTo(current);
  };
  const choose = (select, items, action) => {
    select.append(...items.map(({ title }, i) => make("option", { value: i }, title)));
    select.onchange = () => action(items[select.value]);
  };
  choose(part("projection"), data.projections, (choice) => { projection = choice; showProjection(); });
  choose(part("colour"), data.columns, (choice) => { column = choice; draw(); showLegend(); });
  part("search").oninput = applyFilters;
  part("fit").onclick = fit;
  part("select-shown").onclick = () => { selected.indices = filter.indices; };
  part("clear").onclick = () => { selected.indices = []; };
  part("export").onclick = download;
  const keys = {
    arrowleft: () => step(-1, 0), arrowright: () => step(1, 0), arrowup: () => step(0, 1), arrowdown: () => step(0, -1),
    "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: fit, escape: () => goTo(-1),
    " ": () => { selected.indices = [...new Set([...selected.indices, current])].filter((i) => i >= 0); },
    l: () => { (lasso.active ? pan : lasso).active = true; },
  };
  plot.onkeydown = (event) => {
    const action = keys[event.key.toLowerCase()];
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
  figure.properties.inner_width.change.connect(() => setView(...view()));
  showLegend();
  applyFilters();
  showSelection();
  showProjection();
});
