// The explorer: colours, filters, neighbours, selection and export. Text from files is set as text, never as HTML.
await new Promise((resolve) => document.addEventListener("chartsready", resolve, { once: true }));
const part = (name) => document.querySelector(`.explorer [data-part="${name}"]`);
const data = JSON.parse(part("data").textContent), plot = part("plot"), all = [...data.paths.keys()];
const figure = Bokeh.documents.map((document) => document.get_model_by_name("explorer")).find(Boolean);
const [cells, wheel, pan, lasso, links] = ["cells", "wheel", "pan", "lasso", "links"].map(
  (name) => figure.document.get_model_by_name(name));
const { filter } = cells.view, { selected } = cells.data_source;
let [column] = data.columns, [projection] = data.projections, current = -1;

for (const each of data.columns) {
  each.texts = each.values ?? each.codes.map((code) => each.groups[code].name);
  each.ticked = new Set(); // the numbers of the groups that alone are shown; empty shows all
}
const columnOf = (id) => data.columns.find((each) => each.id === id), label = columnOf("label");
const searched = ["label", "patient", "data_set", "prediction"].map(columnOf);
const textsOf = (i) => [data.paths[i], ...searched.map((each) => each?.texts[i] ?? "")];
const facts = all.map((i) => [
  ...data.columns.map(({ title, texts }) => [title, texts[i]]), ["Image", data.paths[i]], ["No image", data.missing[i]],
].filter(([, text]) => text).map((line) => line.join(": ")).join("\n"));
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// Colours and filters
const applyFilters = () => {
  const query = part("search").value.trim().toLowerCase(), by = data.columns.filter(({ ticked }) => ticked.size);
  filter.indices = all.filter((i) => by.every(({ codes, ticked }) => ticked.has(codes[i]))
    && textsOf(i).some((text) => text.toLowerCase().includes(query)));
  const texts = [`${filter.indices.length} of ${all.length} cells`, ...by.map(({ title }) => `filtered by ${title}`)];
  part("status").textContent = texts.join(", ");
};
const draw = () => {
  const { x, y, axes } = projection;
  const [colour, marker] = ["colour", "marker"].map((name) => column.codes.map((code) => column.groups[code][name]));
  cells.data_source.data = { x, y, thumbnail: data.thumbnails, facts, colour, marker };
  [figure.below[0].axis_label, figure.left[0].axis_label] = axes;
  part("legend").replaceChildren(...column.groups.map(({ name, colour, sign, count }, code) => {
    const box = make("input", { type: "checkbox", checked: column.ticked.has(code) });
    box.onchange = () => { column.ticked[box.checked ? "add" : "delete"](code); applyFilters(); };
    const symbol = make("span", { style: `color: ${colour}`, ariaHidden: "true" }, sign);
    return make("div", {}, make("label", {}, box, " ", symbol, ` ${name || "not known"} (${count})`));
  }));
};

// View: its middle, and the units a pixel, which are the same in both directions
const setView = (x, y, scale) => {
  const [across, up] = [(scale * figure.inner_width) / 2, (scale * figure.inner_height) / 2];
  figure.x_range.setv({ start: x - across, end: x + across });
  figure.y_range.setv({ start: y - up, end: y + up });
};
const view = () => {
  const { x_range: { start, end }, y_range } = figure;
  return [(start + end) / 2, (y_range.start + y_range.end) / 2, (end - start) / figure.inner_width];
};
const zoom = (factor, [x, y, scale] = view()) => setView(x, y, scale / factor);
const fit = () => {
  const { middle, size: [width, height] } = projection;
  setView(...middle, Math.max(width / figure.inner_width, height / figure.inner_height) / 0.9 || 0.01);
};

// One cell and its neighbours
const imageOf = (i, size) => make("img", { src: data.thumbnails[i], width: size, height: size, alt: "" });
const imageButton = (i, caption, className = "") => {
  const title = `${label.texts[i]}, ${data.paths[i]}`, ariaLabel = `${title} ${caption}`, onclick = () => goTo(i);
  return make("button", { type: "button", title, ariaLabel, className, onclick }, imageOf(i, 56), make("br"), caption);
};
const imageGroup = (ariaLabel, made) => make("div", { className: "grid images", role: "group", ariaLabel }, ...made);
const goTo = (i) => {
  current = i;
  part("cell").dataset.row = data.rows[i] ?? "";
  const { x, y } = projection, near = data.neighbours[i] ?? [], ends = i < 0 ? [] : [i, ...near];
  const [x0, y0] = [x, y].map((values) => ends.map(() => values[i]));
  links.data = { x0, y0, x1: ends.map((j) => x[j]), y1: ends.map((j) => y[j]) };
  if (i < 0) return part("cell").replaceChildren("Click a cell to see its nearest neighbours.");
  const isOutside = ({ start, end }, value) => value < start || value > end;
  if (isOutside(figure.x_range, x[i]) || isOutside(figure.y_range, y[i])) setView(x[i], y[i], view()[2]);
  const isSame = (j) => label.codes[j] === label.codes[i];
  const buttons = near.map((j, rank) =>
    imageButton(j, `${data.distances[i][rank]} ${label.texts[j]}`, isSame(j) ? "" : "differs"));
  const summary = `${near.filter(isSame).length} of ${near.length} neighbours have the same class (dashed: another).`;
  part("cell").replaceChildren(imageOf(i, 96), make("p", { style: "white-space: pre-line" }, facts[i]),
    make("p", { className: "muted" }, summary), imageGroup("Nearest neighbours", buttons));
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
  const chosen = selection(), sample = chosen.filter((_, n) => n % Math.ceil(chosen.length / 24) === 0);
  part("export").disabled = part("clear").disabled = !chosen.length;
  part("selection").textContent = chosen.length ? `${chosen.length} selected.` : "No cell is selected.";
  part("selected").replaceChildren(imageGroup("Selected cells", sample.map((i) => imageButton(i, ""))));
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
part("projection").onchange = ({ target }) => {
  projection = data.projections[target.value];
  draw();
  fit();
  goTo(current);
};
part("colour").onchange = ({ target }) => { column = data.columns[target.value]; draw(); };
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
draw();
applyFilters();
showSelection();
fit();
goTo(-1);
