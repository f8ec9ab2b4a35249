"use strict";

// The embedding explorer: points on a canvas, pictures on hover, neighbours on click, a lasso, filters and an export.
// Everything from files goes into the page as text, never as HTML.
(() => {
  const UNKNOWN = 0xffffffff; // code of a cell whose group is not known
  const N_COLOURS = 8;
  // Outlines within a circle of radius 1; colours repeat with the next shape
  const SHAPES = [
    "M.9 0A.9.9 0 1 1-.9 0A.9.9 0 1 1 .9 0Z",
    "M-.8-.8H.8V.8H-.8Z",
    "M0-1.05L1 .75H-1Z",
    "M0-1.1L1 0L0 1.1L-1 0Z",
    "M-.35-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",
  ];
  const N_STYLES = N_COLOURS * SHAPES.length;
  const N_SCALE = 32; // steps of a scale of numbers
  const OTHER = 0; // number of the stamp of cells without a colour of their own; styles and scale steps follow
  const MAX_LEGEND = 300; // entries shown at once
  const MAX_NEAR = 250; // pictures drawn in place of points
  const MAX_SELECTED_PICTURES = 24;
  const PICK_PIXELS = 12;
  const FEW_PIXELS = 4; // a pointer that moves less has clicked

  const decoded = (text, Type) => {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i += 1) {
      bytes[i] = binary.charCodeAt(i);
    }
    return new Type(bytes.buffer);
  };

  /** An element with properties (`aria-` and `data-` ones as attributes) and children. */
  const element = (tag, properties = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "role" || name === "for" || name === "scope") {
        made.setAttribute(name, value);
      } else {
        made[name] = value;
      }
    }
    made.append(...children);
    return made;
  };

  const cellCount = (n) => `${n.toLocaleString("en")} ${n === 1 ? "cell" : "cells"}`;
  const shortNumber = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(3))) : "not known");
  const nameOf = (name) => (name === "" ? "(no name)" : name);

  /** Whether a point is inside a polygon of corners (xs, ys), by the number of edges to the right of it. */
  const isInside = (x, y, xs, ys) => {
    let inside = false;
    for (let i = 0, j = xs.length - 1; i < xs.length; j = i, i += 1) {
      if (ys[i] > y !== ys[j] > y && x < ((xs[j] - xs[i]) * (y - ys[i])) / (ys[j] - ys[i]) + xs[i]) {
        inside = !inside;
      }
    }
    return inside;
  };

  /** A field of a CSV (RFC 4180). Spreadsheets calculate text that begins like a formula: it gets an apostrophe. */
  const csvText = (text) => {
    const safe = /^[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };

  /** Points of a plane in square boxes, so that those near a place are found without looking at all. */
  class Grid {
    constructor(points) {
      const n = points.length / 2;
      let [left, bottom, right, top] = [Infinity, Infinity, -Infinity, -Infinity];
      for (let i = 0; i < n; i += 1) {
        left = Math.min(left, points[2 * i]);
        right = Math.max(right, points[2 * i]);
        bottom = Math.min(bottom, points[2 * i + 1]);
        top = Math.max(top, points[2 * i + 1]);
      }
      this.points = points;
      this.box = { left, bottom, right, top };
      this.side = Math.max(1, Math.ceil(Math.sqrt(n / 2)));
      this.step = Math.max(right - left, top - bottom, 1e-30) / this.side;
      this.starts = new Uint32Array(this.side * this.side + 1);
      this.items = new Uint32Array(n);
      const boxes = new Uint32Array(n);
      for (let i = 0; i < n; i += 1) {
        boxes[i] = this.row(points[2 * i + 1]) * this.side + this.column(points[2 * i]);
        this.starts[boxes[i] + 1] += 1;
      }
      for (let b = 0; b < this.side * this.side; b += 1) {
        this.starts[b + 1] += this.starts[b];
      }
      const next = this.starts.slice();
      for (let i = 0; i < n; i += 1) {
        this.items[next[boxes[i]]] = i;
        next[boxes[i]] += 1;
      }
    }

    column(x) {
      return Math.min(this.side - 1, Math.max(0, Math.floor((x - this.box.left) / this.step)));
    }

    row(y) {
      return Math.min(this.side - 1, Math.max(0, Math.floor((y - this.box.bottom) / this.step)));
    }

    /** The nearest point within `radius` that `accepts`, or -1. */
    nearest(x, y, radius, accepts) {
      let best = -1;
      let least = radius * radius;
      const [first, last] = [this.column(x - radius), this.column(x + radius)];
      for (let row = this.row(y - radius); row <= this.row(y + radius); row += 1) {
        const begin = this.starts[row * this.side + first];
        const end = this.starts[row * this.side + last + 1];
        for (let at = begin; at < end; at += 1) {
          const i = this.items[at];
          const dx = this.points[2 * i] - x;
          const dy = this.points[2 * i + 1] - y;
          const squared = dx * dx + dy * dy;
          if (squared <= least && accepts(i)) {
            least = squared;
            best = i;
          }
        }
      }
      return best;
    }

    /** All points inside a polygon [[x, y], ...] that `accepts`, ascending. */
    inside(polygon, accepts) {
      const xs = Float64Array.from(polygon, (point) => point[0]);
      const ys = Float64Array.from(polygon, (point) => point[1]);
      const [left, right] = [Math.min(...xs), Math.max(...xs)];
      const [bottom, top] = [Math.min(...ys), Math.max(...ys)];
      const found = [];
      for (let row = this.row(bottom); row <= this.row(top); row += 1) {
        const begin = this.starts[row * this.side + this.column(left)];
        const end = this.starts[row * this.side + this.column(right) + 1];
        for (let at = begin; at < end; at += 1) {
          const i = this.items[at];
          if (accepts(i) && isInside(this.points[2 * i], this.points[2 * i + 1], xs, ys)) {
            found.push(i);
          }
        }
      }
      return found.sort((a, b) => a - b);
    }
  }

  /** The pictures: sheets become images when a cell on them is first looked at. */
  class Pictures {
    constructor(settings, blocks) {
      Object.assign(this, settings);
      this.blocks = blocks;
      this.reasons = new Map(settings.missing);
      this.urls = new Map();
      this.images = new Map();
    }

    url(sheet) {
      if (!this.urls.has(sheet)) {
        const bytes = decoded(this.blocks[sheet].textContent, Uint8Array);
        this.urls.set(sheet, URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
      }
      return this.urls.get(sheet);
    }

    /** Sheet number, and the picture's left and top on it in pixels. */
    place(i) {
      const at = i % this.perSheet;
      const sheet = Math.floor(i / this.perSheet);
      return [sheet, (at % this.columns) * this.size, Math.floor(at / this.columns) * this.size];
    }

    /** The decoded sheet, or null until it is; then `later` is called. */
    image(sheet, later) {
      if (!this.images.has(sheet)) {
        const image = new Image();
        this.images.set(sheet, image);
        image.addEventListener("load", later, { once: true });
        image.src = this.url(sheet);
      }
      const image = this.images.get(sheet);
      return image.complete && image.naturalWidth ? image : null;
    }

    /** An element that shows a picture `side` pixels wide, or says why there is none. */
    show(i, side, description) {
      const style = `width:${side}px;height:${side}px;`;
      if (this.reasons.has(i)) {
        const text = `no picture: ${this.reasons.get(i)}`;
        const shown = side >= 80 ? text : "no picture";
        const made = element("div", { className: "explorer-picture explorer-absent", title: text }, shown);
        made.style.cssText = style;
        return made;
      }
      const [sheet, left, top] = this.place(i);
      const zoom = side / this.size;
      const made = element("div", { className: "explorer-picture", role: "img", "aria-label": description });
      made.style.cssText =
        `${style}background-image:url("${this.url(sheet)}");background-size:${this.columns * side}px auto;` +
        `background-position:${-left * zoom}px ${-top * zoom}px`;
      return made;
    }
  }

  class Explorer {
    constructor(root) {
      this.root = root;
      this.id = root.dataset.explorer;
      const data = JSON.parse(document.getElementById(`data-${this.id}`).textContent);
      this.n = data.n;
      this.rows = decoded(data.rows, Uint32Array);
      this.pathParts = data.paths;
      this.columns = data.columns.map((column) => ({
        ...column,
        codes: column.codes === undefined ? null : decoded(column.codes, Uint32Array),
        values: column.values === undefined ? null : decoded(column.values, Float32Array),
      }));
      this.projections = data.projections.map((projection) => {
        const points = decoded(projection.points, Float32Array);
        return { ...projection, points, grid: new Grid(points) };
      });
      this.neighbours = {
        ...data.neighbours,
        positions: decoded(data.neighbours.positions, Uint32Array),
        distances: decoded(data.neighbours.distances, Float32Array),
      };
      const blocks = root.closest("section").querySelectorAll("script.explorer-sheet");
      this.pictures = new Pictures(data.thumbnails, blocks);

      this.projection = this.projections[0];
      this.column = this.columns[0];
      this.hidden = new Map(); // column -> codes that are filtered out
      this.ranges = new Map(); // column -> [least, most, whether cells without a number are shown]
      this.query = "";
      this.shown = new Uint8Array(this.n).fill(1);
      this.nShown = this.n;
      this.selected = new Uint8Array(this.n);
      this.nSelected = 0;
      this.current = -1;
      this.hovered = -1;
      this.tool = "move";
      this.drag = null; // of one pointer: where it began, and where it is
      this.walk = null; // of the keys N and P: the cells gone through
      this.lasso = null; // in the projection's units
      this.lastLasso = null;
      this.isNear = false; // pictures in place of points
      this.sizeFactor = 1;
      this.stamps = new Uint16Array(this.n);
      this.view = { x: 0, y: 0, scale: 1 }; // middle, and CSS pixels a unit
      this.fitScale = 1;
      this.width = 0;
      this.height = 0;
      this.pointers = new Map();
      // classes one after the other would hide each other: points are drawn in an order that mixes them
      this.order = Uint32Array.from({ length: this.n }, (_, i) => i);
      let state = 1;
      for (let i = this.n - 1; i > 0; i -= 1) {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
        const j = state % (i + 1);
        [this.order[i], this.order[j]] = [this.order[j], this.order[i]];
      }

      this.build();
      this.listen();
      this.readColours();
      this.showLegend();
      this.showCell();
      this.showSelection();
      this.showAxes();
      new ResizeObserver(() => this.resize()).observe(this.plot);
    }

    // --- what is known of a cell

    path(i) {
      return this.pathParts.start + this.pathParts.rest[i];
    }

    columnOf(id) {
      return this.columns.find((column) => column.id === id);
    }

    /** The cell's value in a column as text, "" where it is not known. */
    valueOf(column, i) {
      if (!column) {
        return "";
      }
      if (column.codes) {
        return column.codes[i] === UNKNOWN ? "" : column.names[column.codes[i]];
      }
      return Number.isNaN(column.values[i]) ? "" : shortNumber(column.values[i]);
    }

    facts(i) {
      const shown = ["label", "prediction", "probability", "patient", "data_set"].map((id) => this.columnOf(id));
      if (!shown.includes(this.column)) {
        shown.push(this.column);
      }
      const pairs = shown.filter(Boolean).map((column) => [column.title, this.valueOf(column, i)]);
      pairs.push(["Picture", this.path(i)]);
      const parts = pairs
        .filter(([, text]) => text !== "")
        .flatMap(([title, text]) => [element("dt", {}, title), element("dd", {}, text)]);
      return element("dl", { className: "explorer-facts" }, ...parts);
    }

    describe(i) {
      return `${nameOf(this.valueOf(this.columnOf("label"), i))}, ${this.path(i).split(/[\\/]/).pop()}`;
    }

    // --- the page's elements

    build() {
      const button = (text, action, properties = {}) => {
        const made = element("button", { type: "button", ...properties }, text);
        made.addEventListener("click", action);
        return made;
      };
      const field = (title, control) => element("label", { className: "explorer-field" }, title, control);
      const choice = (items, action) => {
        const options = items.map((item, i) => element("option", { value: String(i) }, item.title));
        const made = element("select", {}, ...options);
        made.addEventListener("change", () => action(items[Number(made.value)]));
        return made;
      };

      this.projectionChoice = choice(this.projections, (item) => this.setProjection(item));
      this.columnChoice = choice(this.columns, (item) => this.setColumn(item));
      this.searchField = element("input", { type: "search", placeholder: "path, class, patient ..." });
      this.searchField.addEventListener("input", () => this.search(this.searchField.value));
      this.moveButton = button("Move", () => this.setTool("move"), { "aria-pressed": "true" });
      this.lassoButton = button("Lasso", () => this.setTool("lasso"), { "aria-pressed": "false" });
      const size = element("input", { type: "range", min: "0.4", max: "3", step: "0.1", value: "1" });
      size.addEventListener("input", () => {
        this.sizeFactor = Number(size.value);
        this.redraw();
      });
      this.nearButton = button("Pictures when near", () => this.setNear(!this.isNear), {
        "aria-pressed": "false",
        title: `Draw pictures in place of points where up to ${MAX_NEAR} are in view`,
      });
      const tools = element(
        "div",
        { className: "explorer-buttons", role: "group", "aria-label": "Tools" },
        this.moveButton,
        this.lassoButton,
        button("+", () => this.zoom(1.5), { "aria-label": "Zoom in", title: "Zoom in" }),
        button("\u2212", () => this.zoom(1 / 1.5), { "aria-label": "Zoom out", title: "Zoom out" }),
        button("Fit", () => this.fit(), { title: "Show all cells" }),
        this.nearButton,
      );
      const bar = element(
        "div",
        { className: "explorer-bar" },
        field("Projection", this.projectionChoice),
        field("Colour", this.columnChoice),
        field("Search", this.searchField),
        field("Size of points", size),
        tools,
      );

      this.points = element("canvas", { "aria-hidden": "true" });
      this.overlay = element("canvas", { "aria-hidden": "true" });
      this.tip = element("div", { className: "explorer-tip", hidden: true });
      this.plot = element(
        "div",
        {
          className: "explorer-plot",
          tabIndex: 0,
          role: "application",
          "aria-label": "Cells as points",
          "aria-describedby": `${this.id}-help`,
          "data-tool": "move",
        },
        this.points,
        this.overlay,
        this.tip,
      );
      this.axes = element("p", { className: "explorer-axis muted" });
      this.status = element("p", { role: "status", className: "muted" });
      const keys = [
        "Drag moves the plot, the wheel zooms once the plot has been clicked (with Ctrl always), two fingers pinch.",
        "Shift-drag, or the tool Lasso, selects cells; with Ctrl or Add to selection, more of them.",
        "Keys in the plot: arrows go to the next cell in that direction, Shift-arrows move the plot, + and - zoom, 0 " +
          "shows all, N and P go through the nearest neighbours, Space puts the cell into the selection or takes it " +
          "out, L changes the tool, Escape lets go.",
        "Without a pointer, cells are selected by search and filters and Select all shown.",
        "The export is CSV in UTF-8. Text that begins with = + - @ or a tab gets an apostrophe before it, so that " +
          "a spreadsheet does not calculate it.",
      ];
      const help = element(
        "details",
        { className: "explorer-help" },
        element("summary", {}, "Keys and gestures"),
        element("ul", { id: `${this.id}-help` }, ...keys.map((text) => element("li", {}, text))),
      );

      this.legendTitle = element("h3", {});
      this.legendBody = element("div", {});
      this.chips = element("div", { className: "explorer-buttons" });
      this.cellBody = element("div", { "aria-live": "polite" });
      this.selectionText = element("p", { role: "status" });
      this.selectionBody = element("div", {});
      this.addBox = element("input", { type: "checkbox" });
      this.exportButton = button("Export CSV", () => this.download());
      this.clearButton = button("Clear", () => this.select([]));
      const card = (...children) => element("div", { className: "card" }, ...children);
      const side = element(
        "div",
        { className: "explorer-side" },
        card(this.legendTitle, this.chips, this.legendBody),
        card(element("h3", {}, "Cell"), this.cellBody),
        card(
          element("h3", {}, "Selection"),
          this.selectionText,
          element(
            "div",
            { className: "explorer-buttons" },
            button("Select all shown", () => this.select(this.shownCells())),
            this.clearButton,
            this.exportButton,
          ),
          element("label", {}, this.addBox, " Add to selection"),
          this.selectionBody,
        ),
      );
      const left = element("div", {}, this.plot, this.axes, this.status, help);
      this.root.append(bar, element("div", { className: "explorer-main" }, left, side));
      this.button = button;
    }

    // --- colours

    readColours() {
      const style = getComputedStyle(this.root);
      const read = (name) => style.getPropertyValue(name).trim();
      this.colours = Array.from({ length: N_COLOURS }, (_, i) => read(`--explorer-${i + 1}`));
      this.other = read("--explorer-other");
      this.edge = read("--explorer-edge");
      this.ink = read("--ink");
      this.paper = read("--background");
      this.accent = read("--accent");
      const pen = element("canvas", { width: 1, height: 1 }).getContext("2d");
      pen.fillStyle = this.paper;
      pen.fillRect(0, 0, 1, 1);
      [this.paperPixel] = new Uint32Array(pen.getImageData(0, 0, 1, 1).data.buffer);
      const ends = read("--explorer-scale").split(",").map((text) => {
        const number = parseInt(text.trim().slice(1), 16);
        return [number >> 16, (number >> 8) & 255, number & 255];
      });
      this.scale = Array.from({ length: N_SCALE }, (_, i) => {
        const at = (i / (N_SCALE - 1)) * (ends.length - 1);
        const low = Math.min(Math.floor(at), ends.length - 2);
        const mixed = ends[low].map((value, c) => Math.round(value + (at - low) * (ends[low + 1][c] - value)));
        return `rgb(${mixed.join(" ")})`;
      });
      this.cutStamps = null;
    }

    /** Colour and shape of a stamp. */
    styleOf(stamp) {
      if (stamp === OTHER) {
        return [this.other, SHAPES[0]];
      }
      if (stamp <= N_STYLES) {
        return [this.colours[(stamp - 1) % N_COLOURS], SHAPES[Math.floor((stamp - 1) / N_COLOURS)]];
      }
      return [this.scale[stamp - 1 - N_STYLES], SHAPES[0]];
    }

    /** The stamp of each name of a column. Classes look the same whether they are labels or predictions. */
    stampsOfNames(column) {
      const own = this.columnOf("label");
      const isClass = column === own || column.id === "prediction";
      const names = isClass && own ? [...new Set([...own.names, ...column.names])] : column.names;
      if (names.length <= N_STYLES) {
        const stamp = new Map(names.map((name, i) => [name, i + 1]));
        return column.names.map((name) => stamp.get(name));
      }
      // more names than looks: the largest groups among those shown have one of their own
      const hidden = this.hidden.get(column);
      const counts = this.countsOf(column);
      const largest = column.names
        .map((_, code) => code)
        .filter((code) => !hidden?.has(code))
        .sort((a, b) => counts[b] - counts[a])
        .slice(0, N_STYLES);
      const stamps = column.names.map(() => OTHER);
      largest.forEach((code, i) => {
        stamps[code] = i + 1;
      });
      return stamps;
    }

    countsOf(column) {
      if (!column.counts) {
        column.counts = new Uint32Array(column.names.length + 1); // the last for those not known
        for (const code of column.codes) {
          column.counts[code === UNKNOWN ? column.names.length : code] += 1;
        }
      }
      return column.counts;
    }

    boundsOf(column) {
      if (!column.bounds) {
        const known = column.values.filter((value) => !Number.isNaN(value));
        const end = (choose) => (known.length ? known.reduce((a, b) => choose(a, b)) : 0);
        column.bounds = [end(Math.min), end(Math.max)];
      }
      return column.bounds;
    }

    assignStamps() {
      const column = this.column;
      if (column.codes) {
        this.nameStamps = this.stampsOfNames(column);
        for (let i = 0; i < this.n; i += 1) {
          this.stamps[i] = column.codes[i] === UNKNOWN ? OTHER : this.nameStamps[column.codes[i]];
        }
        return;
      }
      const [least, most] = this.boundsOf(column);
      const step = (N_SCALE - 1) / (most - least || 1);
      for (let i = 0; i < this.n; i += 1) {
        const value = column.values[i];
        this.stamps[i] = Number.isNaN(value) ? OTHER : 1 + N_STYLES + Math.round((value - least) * step);
      }
    }

    // --- filters and search

    applyFilters() {
      const groups = [...this.hidden].filter(([, codes]) => codes.size);
      const ranges = [...this.ranges];
      const query = this.query.trim().toLowerCase();
      if (query && !this.texts) {
        const searched = ["label", "patient", "data_set", "prediction"].map((id) => this.columnOf(id));
        this.texts = Array.from({ length: this.n }, (_, i) =>
          [this.path(i), ...searched.map((column) => this.valueOf(column, i))].join("\n").toLowerCase(),
        );
      }
      this.nShown = 0;
      for (let i = 0; i < this.n; i += 1) {
        const isShown =
          groups.every(([column, codes]) => !codes.has(column.codes[i])) &&
          ranges.every(([column, [least, most, withUnknown]]) => {
            const value = column.values[i];
            return Number.isNaN(value) ? withUnknown : value >= least && value <= most;
          }) &&
          (!query || this.texts[i].includes(query));
        this.shown[i] = isShown ? 1 : 0;
        this.nShown += this.shown[i];
      }
      this.assignStamps();
      this.showChips();
      this.showStatus();
      this.redraw();
    }

    search(text) {
      this.query = text;
      if (this.searchField.value !== text) {
        this.searchField.value = text;
      }
      this.applyFilters();
    }

    clearFilter(column) {
      this.hidden.delete(column);
      this.ranges.delete(column);
      this.showLegend();
    }

    shownCells() {
      const found = [];
      for (let i = 0; i < this.n; i += 1) {
        if (this.shown[i]) {
          found.push(i);
        }
      }
      return found;
    }

    showChips() {
      const chips = [];
      for (const [column, codes] of this.hidden) {
        if (codes.size) {
          chips.push([`${column.title}: ${codes.size.toLocaleString("en")} hidden`, () => this.clearFilter(column)]);
        }
      }
      for (const [column, [least, most]] of this.ranges) {
        chips.push([`${column.title}: ${shortNumber(least)} to ${shortNumber(most)}`, () => this.clearFilter(column)]);
      }
      if (this.query.trim()) {
        chips.push([`Search: ${this.query.trim()}`, () => this.search("")]);
      }
      this.chips.replaceChildren(
        ...chips.map(([text, action]) =>
          this.button(`${text} \u00d7`, action, { className: "explorer-small", title: "Remove this filter" }),
        ),
      );
    }

    showStatus() {
      this.status.textContent =
        this.nShown === this.n
          ? `All ${cellCount(this.n)} shown.`
          : `${this.nShown.toLocaleString("en")} of ${cellCount(this.n)} shown.`;
    }

    showLegend() {
      const column = this.column;
      this.legendTitle.textContent = column.title;
      this.applyFilters();
      this.legendBody.replaceChildren(...(column.codes ? this.groupLegend(column) : this.numberLegend(column)));
    }

    swatch(stamp) {
      const [colour, shape] = this.styleOf(stamp);
      const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      made.setAttribute("viewBox", "-1.2 -1.2 2.4 2.4");
      made.setAttribute("aria-hidden", "true");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", shape);
      path.setAttribute("fill", colour);
      path.setAttribute("stroke", this.edge);
      path.setAttribute("stroke-width", "0.15");
      made.append(path);
      return made;
    }

    groupLegend(column) {
      const counts = this.countsOf(column);
      const hidden = () => this.hidden.get(column) ?? new Set();
      const codes = column.names.map((_, code) => code);
      if (codes.length > N_STYLES) {
        codes.sort((a, b) => counts[b] - counts[a]);
      }
      const entries = codes.map((code) => [code, nameOf(column.names[code]), counts[code]]);
      if (counts[column.names.length]) {
        entries.push([UNKNOWN, "not known", counts[column.names.length]]);
      }
      const all = entries.map(([code]) => code);
      const toggle = (code, isOn) => {
        const now = new Set(hidden());
        if (isOn) {
          now.delete(code);
        } else {
          now.add(code);
        }
        this.hidden.set(column, now);
        this.applyFilters();
        update();
      };
      const list = element("ul", { className: "explorer-legend" });
      const more = element("p", { className: "muted" });
      const rows = new Map();
      const finder = element("input", { type: "search", placeholder: "find an entry", "aria-label": "Find an entry" });
      // checkboxes and looks of the rows there are, in place: the keyboard's focus stays where it is
      const update = () => {
        for (const [code, { box, look }] of rows) {
          box.checked = !hidden().has(code);
          look.replaceChildren(this.swatch(code === UNKNOWN ? OTHER : this.nameStamps[code]));
        }
      };
      const fill = () => {
        const wanted = finder.value.trim().toLowerCase();
        const found = entries.filter(([, name]) => name.toLowerCase().includes(wanted));
        rows.clear();
        list.replaceChildren(
          ...found.slice(0, MAX_LEGEND).map(([code, name, n]) => {
            const box = element("input", { type: "checkbox" });
            const look = element("span", {});
            box.addEventListener("change", () => toggle(code, box.checked));
            rows.set(code, { box, look });
            const only = this.button("only", () => setHidden(all.filter((other) => other !== code)), {
              className: "explorer-small",
              "aria-label": `Show only ${name}`,
            });
            const number = element("span", { className: "number muted" }, n.toLocaleString("en"));
            const text = element("span", { className: "explorer-name" }, name);
            return element("li", {}, element("label", {}, box, look, text, number), only);
          }),
        );
        const nMore = found.length - MAX_LEGEND;
        more.hidden = nMore <= 0;
        more.textContent = `${nMore.toLocaleString("en")} more: find them by name.`;
        update();
      };
      const setHidden = (codesToHide) => {
        this.hidden.set(column, new Set(codesToHide));
        this.applyFilters();
        update();
      };
      finder.addEventListener("input", fill);
      fill();
      const buttons = element(
        "div",
        { className: "explorer-buttons" },
        this.button("All", () => setHidden([]), { className: "explorer-small" }),
        this.button("None", () => setHidden(all), { className: "explorer-small" }),
      );
      if (entries.length > 12) {
        buttons.append(finder);
      }
      const notes = [];
      if (column.names.length > N_STYLES) {
        const text = `The ${N_STYLES} largest entries shown have a look of their own; hide some, and others get one.`;
        notes.push(element("p", { className: "muted" }, text));
      }
      return [buttons, list, more, ...notes];
    }

    numberLegend(column) {
      const [least, most] = this.boundsOf(column);
      const bar = element("canvas", { width: N_SCALE, height: 1, className: "explorer-scale", role: "img" });
      bar.setAttribute("aria-label", `colours from ${shortNumber(least)} to ${shortNumber(most)}`);
      const pen = bar.getContext("2d");
      this.scale.forEach((colour, i) => {
        pen.fillStyle = colour;
        pen.fillRect(i, 0, 1, 1);
      });
      const range = this.ranges.get(column) ?? [least, most, true];
      const box = (title, value) => {
        const input = element("input", { type: "number", step: "any", value: String(Number(value.toPrecision(6))) });
        input.addEventListener("change", apply);
        return [element("label", { className: "explorer-field" }, title, input), input];
      };
      const apply = () => {
        // what a field shows is rounded: its end stays the true one until it is changed
        const read = (input, before, end) => {
          if (input.value === "") {
            return end;
          }
          return Number(input.value) === Number(before.toPrecision(6)) ? before : Number(input.value);
        };
        const now = [read(low, range[0], least), read(high, range[1], most), withUnknown.checked];
        if (now[0] <= least && now[1] >= most && now[2]) {
          this.ranges.delete(column);
        } else {
          this.ranges.set(column, now);
        }
        this.applyFilters();
      };
      const [lowLabel, low] = box("from", range[0]);
      const [highLabel, high] = box("to", range[1]);
      const withUnknown = element("input", { type: "checkbox", checked: range[2] });
      withUnknown.addEventListener("change", apply);
      const [lowEnd, highEnd] = [least, most].map((end) => element("span", {}, shortNumber(end)));
      const ends = element("div", { className: "explorer-axis muted" }, lowEnd, highEnd);
      return [
        bar,
        ends,
        element("div", { className: "explorer-range" }, lowLabel, highLabel),
        element("label", {}, withUnknown, " cells without a number"),
      ];
    }

    // --- projection, view and drawing

    setProjection(projection) {
      this.projection = projection;
      this.projectionChoice.value = String(this.projections.indexOf(projection));
      this.lastLasso = null;
      this.hover(-1);
      this.showAxes();
      this.fit();
    }

    setColumn(column) {
      this.column = column;
      this.columnChoice.value = String(this.columns.indexOf(column));
      this.showLegend();
    }

    setTool(tool) {
      this.tool = tool;
      this.plot.dataset.tool = tool;
      this.moveButton.setAttribute("aria-pressed", String(tool === "move"));
      this.lassoButton.setAttribute("aria-pressed", String(tool === "lasso"));
    }

    setNear(isNear) {
      this.isNear = isNear;
      this.nearButton.setAttribute("aria-pressed", String(isNear));
      this.redraw();
    }

    showAxes() {
      const [across, up] = this.projection.axes;
      this.axes.replaceChildren(element("span", {}, `\u2192 ${across}`), element("span", {}, `\u2191 ${up}`));
    }

    resize() {
      const [width, height] = [this.plot.clientWidth, this.plot.clientHeight];
      if (!width || !height || (width === this.width && height === this.height && this.ratio === devicePixelRatio)) {
        return;
      }
      const isFirst = this.width === 0;
      const wasFitting = this.view.scale === this.fitScale;
      [this.width, this.height, this.ratio] = [width, height, devicePixelRatio];
      for (const canvas of [this.points, this.overlay]) {
        canvas.width = Math.round(width * this.ratio);
        canvas.height = Math.round(height * this.ratio);
      }
      this.cutStamps = null;
      if (isFirst || wasFitting) {
        this.fit();
      }
      this.draw();
    }

    fit() {
      const { left, right, bottom, top } = this.projection.grid.box;
      const margin = 0.9;
      const [across, up] = [right - left, top - bottom];
      const scale = Math.min((this.width * margin) / across, (this.height * margin) / up);
      this.fitScale = Number.isFinite(scale) && scale > 0 ? scale : 1;
      this.view = { x: (left + right) / 2, y: (bottom + top) / 2, scale: this.fitScale };
      this.redraw();
    }

    /** Zoom, with the place under (x, y) in the plot staying where it is. */
    zoom(factor, x = this.width / 2, y = this.height / 2) {
      const [atX, atY] = this.toData(x, y);
      const scale = Math.min(Math.max(this.view.scale * factor, this.fitScale / 4), this.fitScale * 5000);
      this.view = { x: atX - (x - this.width / 2) / scale, y: atY + (y - this.height / 2) / scale, scale };
      this.redraw();
    }

    pan(dx, dy) {
      this.view.x -= dx / this.view.scale;
      this.view.y += dy / this.view.scale;
      this.redraw();
    }

    /** From CSS pixels in the plot to the projection's units, and back. */
    toData(x, y) {
      return [
        this.view.x + (x - this.width / 2) / this.view.scale,
        this.view.y - (y - this.height / 2) / this.view.scale,
      ];
    }

    toPlot(i) {
      const { points } = this.projection;
      return [
        (points[2 * i] - this.view.x) * this.view.scale + this.width / 2,
        (this.view.y - points[2 * i + 1]) * this.view.scale + this.height / 2,
      ];
    }

    radius() {
      const base = this.n > 5000 ? 2.4 : this.n > 800 ? 3.4 : 5;
      const zoomed = Math.min(Math.max(this.view.scale / this.fitScale, 1) ** 0.3, 2.2);
      return base * zoomed * this.sizeFactor;
    }

    redraw() {
      if (!this.frame) {
        this.frame = requestAnimationFrame(() => this.draw());
      }
    }

    redrawOverlay() {
      if (!this.frame && !this.overlayFrame) {
        this.overlayFrame = requestAnimationFrame(() => this.drawOverlay());
      }
    }

    /**
     * The pixels of all looks at the present size. Without graphics acceleration, putting them into the picture one by
     * one is ten times as fast as letting the canvas draw each point.
     */
    makeStamps(radius) {
      const size = radius * this.ratio;
      const width = this.points.width;
      const key = `${size} ${width}`;
      if (this.cutStamps?.key === key) {
        return this.cutStamps;
      }
      const side = 2 * Math.ceil(size * 1.2) + 2;
      const stride = width + 2 * side; // a margin, so that stamps on the border need no cutting
      const canvas = element("canvas", { width: side, height: side });
      const pen = canvas.getContext("2d", { willReadFrequently: true });
      const cut = (stamp, alpha) => {
        const [colour, shape] = this.styleOf(stamp);
        const path = new Path2D(shape);
        pen.setTransform(1, 0, 0, 1, 0, 0);
        pen.clearRect(0, 0, side, side);
        pen.setTransform(size, 0, 0, size, side / 2, side / 2);
        pen.globalAlpha = alpha;
        pen.fillStyle = colour;
        pen.fill(path);
        pen.lineWidth = Math.min(0.28, (0.7 * this.ratio) / size);
        pen.strokeStyle = this.edge;
        pen.stroke(path);
        const { data } = pen.getImageData(0, 0, side, side);
        const found = [];
        for (let at = 0; at < side * side; at += 1) {
          const [r, g, b, a] = data.subarray(4 * at, 4 * at + 4);
          if (a > 0) {
            const share = a + (a >> 7); // 0 to 256
            found.push([Math.floor(at / side) * stride + (at % side), 256 - share, ((b << 16) | r) * share, g * share]);
          }
        }
        const part = (column, Type) => Type.from(found, (pixel) => pixel[column]);
        const [offset, rest] = [part(0, Int32Array), part(1, Int32Array)];
        return { offset, rest, rb: part(2, Uint32Array), g: part(3, Uint32Array) };
      };
      const stamps = Array.from({ length: 1 + N_STYLES + N_SCALE }, (_, stamp) => cut(stamp, 1));
      const image = new ImageData(stride, this.points.height + 2 * side);
      const pixels = new Uint32Array(image.data.buffer);
      this.cutStamps = { key, side, stride, stamps, pale: cut(OTHER, 0.4), image, pixels };
      return this.cutStamps;
    }

    /** Draw all points. Returns the milliseconds it took. */
    draw() {
      const start = performance.now();
      cancelAnimationFrame(this.frame);
      this.frame = 0;
      if (!this.width) {
        return 0;
      }
      const { side, stride, stamps, pale, image, pixels } = this.makeStamps(this.radius());
      const { points } = this.projection;
      const [w, h] = [this.points.width, this.points.height];
      const scale = this.view.scale * this.ratio;
      const left = w / 2 - this.view.x * scale - side / 2;
      const top = h / 2 + this.view.y * scale - side / 2;
      const { shown, selected, order, stamps: stampOf } = this;
      const inView = [];
      // colours are red, green, blue, alpha from the lowest byte up, as processors with browsers have it
      const put = (stamp, first) => {
        const { offset, rest, rb, g } = stamp;
        for (let p = 0; p < offset.length; p += 1) {
          const at = first + offset[p];
          const under = pixels[at];
          pixels[at] =
            0xff000000 |
            (((rb[p] + Math.imul(under & 0xff00ff, rest[p])) >>> 8) & 0xff00ff) |
            ((g[p] + Math.imul((under >>> 8) & 0xff, rest[p])) & 0xff00);
        }
      };
      // cells outside the selection lose their colour: only paler, many above each other would look as before
      const pass = (isSelected, only = null) => {
        for (let at = 0; at < order.length; at += 1) {
          const i = order[at];
          if (shown[i] && (isSelected === null || selected[i] === isSelected)) {
            const x = Math.round(left + points[2 * i] * scale);
            const y = Math.round(top - points[2 * i + 1] * scale);
            if (x > -side && x < w && y > -side && y < h) {
              put(only ?? stamps[stampOf[i]], (y + side) * stride + x + side);
              if (this.isNear && inView.length <= MAX_NEAR) {
                inView.push(i);
              }
            }
          }
        }
      };
      pixels.fill(this.paperPixel);
      if (this.nSelected) {
        pass(0, pale);
        pass(1);
      } else {
        pass(null);
      }
      const pen = this.points.getContext("2d");
      pen.putImageData(image, -side, -side);
      if (this.isNear && inView.length <= MAX_NEAR) {
        this.drawPictures(pen, inView);
      }
      const ms = performance.now() - start;
      this.drawOverlay();
      return ms;
    }

    drawPictures(pen, cells) {
      const side = 44;
      pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      pen.lineWidth = 3;
      for (const i of cells) {
        const [sheet, left, top] = this.pictures.place(i);
        const image = this.pictures.reasons.has(i) ? null : this.pictures.image(sheet, () => this.redraw());
        if (image) {
          const [x, y] = this.toPlot(i).map((at) => at - side / 2);
          const { size } = this.pictures;
          pen.globalAlpha = this.nSelected && !this.selected[i] ? 0.35 : 1;
          pen.strokeStyle = this.styleOf(this.stamps[i])[0];
          pen.strokeRect(x, y, side, side);
          pen.drawImage(image, left, top, size, size, x, y, side, side);
        }
      }
      pen.globalAlpha = 1;
    }

    /** Rings, lines to neighbours and the lasso, on a canvas of their own: moving the pointer draws no points. */
    drawOverlay() {
      cancelAnimationFrame(this.overlayFrame);
      this.overlayFrame = 0;
      const pen = this.overlay.getContext("2d");
      pen.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      pen.clearRect(0, 0, this.width, this.height);
      const ring = (i, radius, width, colour) => {
        const [x, y] = this.toPlot(i);
        for (const [stroke, thick] of [[this.paper, width + 2], [colour, width]]) {
          pen.beginPath();
          pen.arc(x, y, radius, 0, 2 * Math.PI);
          pen.strokeStyle = stroke;
          pen.lineWidth = thick;
          pen.stroke();
        }
      };
      const radius = this.radius();
      if (this.current >= 0) {
        const near = this.neighboursOf(this.current);
        pen.strokeStyle = this.ink;
        pen.lineWidth = 1;
        pen.globalAlpha = 0.6;
        pen.beginPath();
        for (const i of near) {
          pen.moveTo(...this.toPlot(this.current));
          pen.lineTo(...this.toPlot(i));
        }
        pen.stroke();
        pen.globalAlpha = 1;
        near.forEach((i) => ring(i, radius + 3, 1.5, this.accent));
        ring(this.current, radius + 5, 2.5, this.ink);
      }
      if (this.hovered >= 0) {
        ring(this.hovered, radius + 3, 2, this.ink);
      }
      if (this.lasso?.length > 1) {
        pen.beginPath();
        for (const [x, y] of this.lasso) {
          pen.lineTo(
            (x - this.view.x) * this.view.scale + this.width / 2,
            (this.view.y - y) * this.view.scale + this.height / 2,
          );
        }
        pen.closePath();
        pen.globalAlpha = 0.12;
        pen.fillStyle = this.accent;
        pen.fill("evenodd");
        pen.globalAlpha = 1;
        pen.strokeStyle = this.accent;
        pen.lineWidth = 1.5;
        pen.setLineDash([5, 3]);
        pen.stroke();
        pen.setLineDash([]);
      }
    }

    // --- one cell and its neighbours

    /** The shown cell at a place in the plot, or -1. */
    pick(x, y) {
      const reach = Math.max(PICK_PIXELS, this.radius() + 2) / this.view.scale;
      return this.projection.grid.nearest(...this.toData(x, y), reach, (i) => this.shown[i] === 1);
    }

    neighboursOf(i) {
      const { k, positions } = this.neighbours;
      return Array.from(positions.subarray(i * k, (i + 1) * k));
    }

    hover(i) {
      if (i === this.hovered) {
        return;
      }
      this.hovered = i;
      this.plot.toggleAttribute("data-over", i >= 0);
      this.tip.hidden = i < 0;
      if (i >= 0) {
        this.tip.replaceChildren(this.pictures.show(i, this.tipSide(), this.describe(i)), this.facts(i));
        const [x, y] = this.toPlot(i);
        const beside = x + 14 + this.tip.offsetWidth < this.width ? x + 14 : Math.max(4, x - 14 - this.tip.offsetWidth);
        const below = y + 14 + this.tip.offsetHeight < this.height ? y + 14 : y - 14 - this.tip.offsetHeight;
        this.tip.style.left = `${beside}px`;
        this.tip.style.top = `${Math.max(4, below)}px`;
      }
      this.redrawOverlay();
    }

    tipSide() {
      return Math.max(96, this.pictures.size);
    }

    /** Make a cell the current one (-1: none), and bring it into view if it is not. */
    goTo(i) {
      this.current = i;
      if (i >= 0) {
        const [x, y] = this.toPlot(i);
        if (x < 0 || y < 0 || x > this.width || y > this.height) {
          const { points } = this.projection;
          this.view = { ...this.view, x: points[2 * i], y: points[2 * i + 1] };
          this.redraw();
        }
      }
      this.showCell();
      this.redrawOverlay();
    }

    showCell() {
      const i = this.current;
      if (i < 0) {
        const text = "Click a cell to see its nearest neighbours.";
        this.cellBody.replaceChildren(element("p", { className: "muted" }, text));
        return;
      }
      const { k, distances, metric } = this.neighbours;
      const label = this.columnOf("label");
      const near = this.neighboursOf(i);
      const nSame = near.filter((j) => label.codes[j] === label.codes[i]).length;
      const buttons = near.map((j, rank) => {
        const distance = shortNumber(distances[i * k + rank]);
        const text = nameOf(this.valueOf(label, j));
        const made = this.button("", () => this.goTo(j), {
          title: `${text}\n${this.path(j)}`,
          "aria-label": `Neighbour ${rank + 1}: ${this.describe(j)}, distance ${distance}`,
          "data-cell": String(j),
        });
        if (label.codes[j] !== label.codes[i]) {
          made.dataset.differs = "";
        }
        made.append(
          this.pictures.show(j, 56, this.describe(j)),
          element("span", { className: "number" }, distance),
          element("span", {}, text),
        );
        made.addEventListener("pointerenter", () => this.hover(j));
        made.addEventListener("pointerleave", () => this.hover(-1));
        return made;
      });
      const group = { className: "explorer-pictures", role: "group", "aria-label": "Nearest neighbours" };
      const list = element("div", group, ...buttons);
      list.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const at = buttons.indexOf(document.activeElement);
        if (step && buttons[at + step]) {
          event.preventDefault();
          buttons[at + step].focus();
        }
      });
      const picture = this.pictures.show(i, 96, this.describe(i));
      const current = element("div", { className: "explorer-current" }, picture, this.facts(i));
      const summary = k
        ? `${nSame} of ${k} nearest neighbours are of the same class (dashed: another). Below each its ${metric}.`
        : "It is the only cell.";
      this.cellBody.replaceChildren(current, element("p", { className: "muted" }, summary), list);
    }

    /** The nearest shown cell to the left, right, above or below the current one: [dx, dy] in the plot. */
    step([dx, dy]) {
      if (this.current < 0) {
        const [x, y] = this.toData(this.width / 2, this.height / 2);
        this.goTo(this.projection.grid.nearest(x, y, Infinity, (i) => this.shown[i] === 1));
        return;
      }
      const { points } = this.projection;
      const [x, y] = [points[2 * this.current], points[2 * this.current + 1]];
      let [best, least] = [-1, Infinity];
      for (let i = 0; i < this.n; i += 1) {
        const right = points[2 * i] - x;
        const up = points[2 * i + 1] - y;
        const along = right * dx - up * dy;
        // within 45 degrees of the direction
        if (this.shown[i] && along > 0 && along * along * 2 >= right * right + up * up) {
          const squared = right * right + up * up;
          if (squared < least) {
            [best, least] = [i, squared];
          }
        }
      }
      if (best >= 0) {
        this.goTo(best);
      }
    }

    /** Go through the neighbours of the cell that N or P was first pressed at. */
    stepNeighbour(by) {
      if (this.current < 0) {
        this.step([1, 0]);
        return;
      }
      const { k } = this.neighbours;
      if (!this.walk || this.walk.at !== this.current) {
        this.walk = { around: [this.current, ...this.neighboursOf(this.current)], position: 0 };
      }
      this.walk.position = (this.walk.position + by + k + 1) % (k + 1);
      this.walk.at = this.walk.around[this.walk.position];
      this.goTo(this.walk.at);
    }

    // --- selection and export

    /** Select cells, beside those that are selected if asked for. */
    select(cells, isAdded = this.addBox.checked && cells.length > 0) {
      if (!isAdded) {
        this.selected.fill(0);
      }
      cells.forEach((i) => {
        this.selected[i] = 1;
      });
      this.showSelection();
      this.redraw();
    }

    toggleSelected(i) {
      this.selected[i] = 1 - this.selected[i];
      this.showSelection();
      this.redraw();
    }

    selectInside(polygon, isAdded) {
      this.lastLasso = polygon;
      this.select(this.projection.grid.inside(polygon, (i) => this.shown[i] === 1), isAdded);
    }

    selection() {
      const found = [];
      for (let i = 0; i < this.n; i += 1) {
        if (this.selected[i]) {
          found.push(i);
        }
      }
      return found;
    }

    showSelection() {
      const cells = this.selection();
      this.nSelected = cells.length;
      this.exportButton.disabled = !cells.length;
      this.clearButton.disabled = !cells.length;
      if (!cells.length) {
        this.selectionText.textContent = "No cell is selected. Shift-drag around cells, or select all that are shown.";
        this.selectionBody.replaceChildren();
        return;
      }
      this.selectionText.textContent = `${cellCount(cells.length)} selected.`;
      const label = this.columnOf("label");
      const right = this.columnOf("right");
      const [counts, rights] = [new Map(), new Map()];
      for (const i of cells) {
        const code = label.codes[i];
        counts.set(code, (counts.get(code) ?? 0) + 1);
        if (right && this.valueOf(right, i) === "right") {
          rights.set(code, (rights.get(code) ?? 0) + 1);
        }
      }
      const number = (text) => element("td", { className: "number" }, text);
      const rows = [...counts]
        .sort((a, b) => b[1] - a[1])
        .map(([code, n]) =>
          element(
            "tr",
            {},
            element("th", { scope: "row" }, nameOf(label.names[code])),
            number(n.toLocaleString("en")),
            number(`${((100 * n) / cells.length).toFixed(1)} %`),
            number(`${((100 * n) / this.countsOf(label)[code]).toFixed(0)} %`),
            ...(right ? [number((rights.get(code) ?? 0).toLocaleString("en"))] : []),
          ),
        );
      const titles = ["Class", "Cells", "Share", "Of class", ...(right ? ["Right"] : [])];
      const head = titles.map((text, i) => element("th", { scope: "col", className: i ? "number" : "" }, text));
      const table = element(
        "table",
        {},
        element("caption", {}, "Classes of the selection"),
        element("thead", {}, element("tr", {}, ...head)),
        element("tbody", {}, ...rows),
      );
      const step = Math.max(1, cells.length / MAX_SELECTED_PICTURES);
      const nPictures = Math.min(cells.length, MAX_SELECTED_PICTURES);
      const some = Array.from({ length: nPictures }, (_, at) => cells[Math.floor(at * step)]);
      const pictures = some.map((i) => {
        const made = this.button("", () => this.goTo(i), { title: this.path(i), "aria-label": this.describe(i) });
        made.append(this.pictures.show(i, 48, this.describe(i)));
        return made;
      });
      const group = { className: "explorer-pictures", role: "group", "aria-label": "Selected cells" };
      const shown = element("div", group, ...pictures);
      const text = cells.length > some.length ? [element("p", { className: "muted" }, `${some.length} of them:`)] : [];
      this.selectionBody.replaceChildren(table, ...text, shown);
    }

    csv() {
      const known = ["label", "patient", "data_set", "prediction"].map((id) => this.columnOf(id));
      const { points } = this.projection;
      const lines = ["index,path,label,patient,data_set,prediction,x,y"];
      for (const i of this.selection()) {
        const texts = [this.path(i), ...known.map((column) => this.valueOf(column, i))].map(csvText);
        lines.push([this.rows[i], ...texts, points[2 * i], points[2 * i + 1]].join(","));
      }
      return `${lines.join("\r\n")}\r\n`;
    }

    download() {
      // Excel takes UTF-8 for what it is only after a byte order mark
      const url = URL.createObjectURL(new Blob(["\ufeff", this.csv()], { type: "text/csv;charset=utf-8" }));
      const link = element("a", { href: url, download: "selected_cells.csv" });
      document.body.append(link);
      link.click();
      link.remove();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
    }

    // --- pointer and keys

    place(event) {
      const box = this.plot.getBoundingClientRect();
      return [event.clientX - box.left - this.plot.clientLeft, event.clientY - box.top - this.plot.clientTop];
    }

    listen() {
      const { plot } = this;
      plot.addEventListener("pointerdown", (event) => this.onDown(event));
      plot.addEventListener("pointermove", (event) => this.onMove(event));
      plot.addEventListener("pointerup", (event) => this.onUp(event));
      plot.addEventListener("pointercancel", (event) => {
        this.pointers.delete(event.pointerId);
        this.drag = null;
        this.lasso = null;
        this.redrawOverlay();
      });
      plot.addEventListener("pointerleave", () => this.hover(-1));
      plot.addEventListener("keydown", (event) => this.onKey(event));
      plot.addEventListener(
        "wheel",
        (event) => {
          // a page that scrolls must not get stuck on the plot; pinches on a touchpad come with Ctrl
          if (event.ctrlKey || document.activeElement === plot) {
            event.preventDefault();
            const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
            this.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.008 : 0.002)), ...this.place(event));
          }
        },
        { passive: false },
      );
      document.addEventListener("themechange", () => {
        this.readColours();
        this.showLegend();
      });
    }

    onDown(event) {
      if (event.button !== 0) {
        return;
      }
      const place = this.place(event);
      this.pointers.set(event.pointerId, place);
      plotFocus(this.plot);
      this.plot.setPointerCapture(event.pointerId);
      this.hover(-1);
      if (this.pointers.size === 2) {
        this.drag = null;
        this.lasso = null;
        return;
      }
      this.drag = { from: place, at: place, hasMoved: false, isLasso: this.tool === "lasso" || event.shiftKey };
      if (this.drag.isLasso) {
        this.lasso = [this.toData(...place)];
      }
    }

    onMove(event) {
      const place = this.place(event);
      if (this.pointers.size === 2 && this.pointers.has(event.pointerId)) {
        this.pinch(event.pointerId, place);
        return;
      }
      if (!this.drag) {
        if (event.pointerType !== "touch") {
          this.hover(this.pick(...place));
        }
        return;
      }
      const { from, at } = this.drag;
      this.drag.hasMoved ||= Math.hypot(place[0] - from[0], place[1] - from[1]) > FEW_PIXELS;
      if (this.drag.isLasso) {
        this.lasso.push(this.toData(...place));
        this.redrawOverlay();
      } else if (this.drag.hasMoved) {
        this.plot.dataset.dragging = "";
        this.pan(place[0] - at[0], place[1] - at[1]);
        this.drag.at = place;
      }
    }

    pinch(id, place) {
      const [other] = [...this.pointers].find(([key]) => key !== id).slice(1);
      const before = this.pointers.get(id);
      const distance = (a) => Math.max(1, Math.hypot(a[0] - other[0], a[1] - other[1]));
      const middle = (a) => [(a[0] + other[0]) / 2, (a[1] + other[1]) / 2];
      const [was, is] = [middle(before), middle(place)];
      this.pan(is[0] - was[0], is[1] - was[1]);
      this.zoom(distance(place) / distance(before), ...is);
      this.pointers.set(id, place);
    }

    onUp(event) {
      this.pointers.delete(event.pointerId);
      const { drag, lasso } = this;
      this.drag = null;
      this.lasso = null;
      delete this.plot.dataset.dragging;
      if (!drag) {
        return;
      }
      if (!drag.hasMoved) {
        this.goTo(this.pick(...drag.from));
      } else if (drag.isLasso && lasso.length > 2) {
        this.selectInside(lasso, event.ctrlKey || event.metaKey || this.addBox.checked);
      }
      this.redrawOverlay();
    }

    onKey(event) {
      if (event.target !== this.plot || event.ctrlKey || event.metaKey || event.altKey) {
        return;
      }
      const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      const direction = directions[event.key];
      const actions = {
        "+": () => this.zoom(1.3),
        "=": () => this.zoom(1.3),
        "-": () => this.zoom(1 / 1.3),
        0: () => this.fit(),
        n: () => this.stepNeighbour(1),
        p: () => this.stepNeighbour(-1),
        l: () => this.setTool(this.tool === "lasso" ? "move" : "lasso"),
        " ": () => this.current >= 0 && this.toggleSelected(this.current),
        Escape: () => this.letGo(),
      };
      if (direction && event.shiftKey) {
        this.pan(-60 * direction[0], -60 * direction[1]);
      } else if (direction) {
        this.step(direction);
      } else if (actions[event.key.toLowerCase()] ?? actions[event.key]) {
        (actions[event.key.toLowerCase()] ?? actions[event.key])();
      } else {
        return;
      }
      event.preventDefault();
    }

    letGo() {
      this.drag = null;
      this.lasso = null;
      this.hover(-1);
      this.goTo(-1);
    }

    /** What tests and scripts may use; positions are those of the cells shown, places are in the window. */
    api() {
      const inWindow = (i) => {
        const box = this.plot.getBoundingClientRect();
        const [x, y] = this.toPlot(i);
        return [x + box.left + this.plot.clientLeft, y + box.top + this.plot.clientTop];
      };
      return {
        n: this.n,
        projections: this.projections.map((projection) => projection.id),
        columns: this.columns.map((column) => column.id),
        path: (i) => this.path(i),
        value: (id, i) => this.valueOf(this.columnOf(id), i),
        place: inWindow,
        pick: (x, y) => this.pick(...this.place({ clientX: x, clientY: y })),
        neighbours: (i) => this.neighboursOf(i),
        current: () => this.current,
        hovered: () => this.hovered,
        goTo: (i) => this.goTo(i),
        setProjection: (id) => this.setProjection(this.projections.find((projection) => projection.id === id)),
        setColumn: (id) => this.setColumn(this.columnOf(id)),
        search: (text) => this.search(text),
        shown: () => this.shownCells(),
        select: (cells) => this.select(cells, false),
        selectInside: (polygon) => this.selectInside(polygon, false),
        selection: () => this.selection(),
        lastLasso: () => this.lastLasso,
        csv: () => this.csv(),
        zoom: (factor) => this.zoom(factor),
        fit: () => this.fit(),
        view: () => ({ ...this.view }),
        draw: () => this.draw(),
        canvas: this.points,
      };
    }
  }

  // a click into the plot must not scroll the page to show all of it
  const plotFocus = (plot) => plot.focus({ preventScroll: true });

  const explorers = [...document.querySelectorAll("[data-explorer]")].map((root) => new Explorer(root));
  window.explorers = explorers.map((explorer) => explorer.api());
  [window.explorer] = window.explorers;
})();
