"use strict";

// Cards of cells: attention of a chosen head, and similarity to a chosen patch.
(() => {
  const source = document.getElementById("data-cells");
  if (!source) {
    return;
  }
  const data = JSON.parse(source.textContent);
  const { rows, columns } = data;
  const nPatches = rows * columns;

  const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const palette = bytesOf(data.palette);

  // A map of one byte a patch, as a canvas of one pixel a patch
  const painted = (levels) => {
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const pen = canvas.getContext("2d");
    const image = pen.createImageData(columns, rows);
    levels.forEach((level, i) => {
      image.data.set(palette.subarray(3 * level, 3 * level + 3), 4 * i);
      image.data[4 * i + 3] = 255;
    });
    pen.putImageData(image, 0, 0);
    return canvas;
  };

  const stretched = (values) => {
    let low = 255;
    let high = 0;
    values.forEach((value) => {
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
    return values.map((value) => (high > low ? Math.round((255 * (value - low)) / (high - low)) : 255));
  };

  const cards = [...document.querySelectorAll("#cells .cells-card")].map((element) => {
    const cell = data.cells[Number(element.dataset.cell)];
    return {
      name: cell.name,
      attention: bytesOf(cell.attention),
      similarity: bytesOf(cell.similarity),
      image: element.querySelector(".cells-attention"),
      caption: element.querySelector(".cells-attention").parentElement.querySelector("figcaption"),
      canvas: element.querySelector(".cells-similarity"),
      told: element.querySelector("output"),
      row: Math.floor(rows / 2),
      column: Math.floor(columns / 2),
    };
  });

  const head = document.getElementById("cells-head");
  const showHead = () => {
    const number = Number(head.value); // -1 for the mean, which stands first
    const words = number < 0 ? "mean of heads" : `head ${number + 1}`;
    cards.forEach((card) => {
      const start = (number + 1) * nPatches;
      card.image.src = painted(card.attention.subarray(start, start + nPatches)).toDataURL();
      card.image.alt = `CLS attention, ${words} of ${card.name}`;
      card.caption.textContent = `CLS attention, ${words}`;
    });
  };
  head.addEventListener("change", showHead);

  // Only the upper triangle of the symmetric matrix is in the page, row after row
  const storedAt = (a, b) => {
    const [i, j] = a < b ? [a, b] : [b, a];
    return i * nPatches - (i * (i - 1)) / 2 + (j - i);
  };
  const cosine = (card, a, b) => card.similarity[storedAt(a, b)] / 127.5 - 1;

  const tell = (card, row, column) => {
    const marked = `marked: row ${card.row + 1}, column ${card.column + 1}`;
    const other =
      row === undefined
        ? ""
        : `; row ${row + 1}, column ${column + 1}: ` +
          cosine(card, card.row * columns + card.column, row * columns + column).toFixed(2);
    card.told.textContent = marked + other;
  };

  const showSimilarity = (card) => {
    const marked = card.row * columns + card.column;
    const values = Uint8Array.from({ length: nPatches }, (_, i) => card.similarity[storedAt(marked, i)]);
    const { canvas } = card;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(painted(stretched(values)), 0, 0, canvas.width, canvas.height);
    const width = canvas.width / columns;
    const height = canvas.height / rows;
    // white in black, so that it shows on any colour
    [
      ["#000000", 5],
      ["#ffffff", 2],
    ].forEach(([colour, thickness]) => {
      pen.strokeStyle = colour;
      pen.lineWidth = thickness;
      pen.strokeRect(card.column * width, card.row * height, width, height);
    });
    canvas.dataset.row = String(card.row);
    canvas.dataset.column = String(card.column);
    tell(card);
  };

  const within = (value, n) => Math.min(n - 1, Math.max(0, value));
  const patchAt = (card, event) => {
    const box = card.canvas.getBoundingClientRect();
    return [
      within(Math.floor(((event.clientY - box.top) / box.height) * rows), rows),
      within(Math.floor(((event.clientX - box.left) / box.width) * columns), columns),
    ];
  };
  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  cards.forEach((card) => {
    card.canvas.addEventListener("click", (event) => {
      [card.row, card.column] = patchAt(card, event);
      showSimilarity(card);
    });
    card.canvas.addEventListener("pointermove", (event) => tell(card, ...patchAt(card, event)));
    card.canvas.addEventListener("pointerleave", () => tell(card));
    card.canvas.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) {
        return;
      }
      event.preventDefault(); // otherwise the page scrolls
      card.row = within(card.row + step[0], rows);
      card.column = within(card.column + step[1], columns);
      showSimilarity(card);
    });
    showSimilarity(card);
  });
  showHead();
})();
