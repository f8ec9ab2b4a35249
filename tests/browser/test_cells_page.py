"""Cells in a browser: the choice of a head, and the similarity to a patch by mouse and by keyboard."""

import numpy as np
import pytest

from dinov2.eval.maps.cells import PALETTE, CellMaps, levels
from dinov2.eval.pages.cells import maps_section
from dinov2.eval.pages.page import write_page

ROWS, COLUMNS = 4, 5
EVIL = "</script><img src=x onerror=alert(1)>"
COLOUR_AT = """
const canvas = document.querySelectorAll(".cells-similarity")[arguments[0]];
const [row, column] = [arguments[1], arguments[2]];
const x = ((column + 0.5) * canvas.width) / arguments[4], y = ((row + 0.5) * canvas.height) / arguments[3];
const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const pen = copy.getContext("2d", { willReadFrequently: true });
pen.drawImage(canvas, 0, 0);
return [...pen.getImageData(Math.round(x), Math.round(y), 1, 1).data].slice(0, 3);
"""
PIXELS_OF_ATTENTION = """
const done = arguments[0], image = document.querySelector(".cells-attention");
image.decode().then(() => {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  done([...pen.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 < 3));
});
"""


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    n = ROWS * COLUMNS
    half = rng.integers(0, 255, (2, n, n), dtype=np.uint8)
    similarity = np.maximum(half, half.transpose(0, 2, 1))
    similarity[:, range(n), range(n)] = 255
    return CellMaps(
        names=[f"class/{EVIL}.png", "class/b.png"],
        images=rng.integers(0, 255, (2, 40, 50, 3), dtype=np.uint8),
        pca=rng.integers(0, 255, (2, ROWS, COLUMNS, 3), dtype=np.uint8),
        attention=rng.random((2, 3, ROWS, COLUMNS)).astype(np.float32),
        rollout=rng.random((2, ROWS, COLUMNS)).astype(np.float32),
        similarity=similarity,
    )


@pytest.fixture
def page(browser, maps, tmp_path):
    file = tmp_path / "cells.html"
    write_page(file, "cells", [maps_section(maps)])
    browser.open(file)
    return file


def shown(browser, cell, row, column):
    return browser.js(COLOUR_AT, cell, row, column, ROWS, COLUMNS)


def expected(maps, cell, marked, row, column):
    of_marked = maps.similarity[cell, marked[0] * COLUMNS + marked[1]].reshape(ROWS, COLUMNS)
    return PALETTE[levels(of_marked.astype(np.float64))[row, column]].tolist()


def test_a_click_shows_what_is_like_that_patch(browser, maps, page):
    middle = (ROWS // 2, COLUMNS // 2)
    for row, column in np.ndindex(ROWS, COLUMNS):
        np.testing.assert_allclose(shown(browser, 1, row, column), expected(maps, 1, middle, row, column), atol=2)
    canvas = browser.driver.find_elements("css selector", ".cells-similarity")[1]
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    box = browser.js("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", canvas)
    at = [(box[0] + box[2] * (c + 0.5) / COLUMNS, box[1] + box[3] * (r + 0.5) / ROWS) for r, c in ((3, 1), (0, 4))]
    browser.mouse(at[0], "down", "up", at[1])
    for row, column in np.ndindex(ROWS, COLUMNS):
        np.testing.assert_allclose(shown(browser, 1, row, column), expected(maps, 1, (3, 1), row, column), atol=2)
    cosine = maps.similarity[1, 3 * COLUMNS + 1, 4] / 127.5 - 1
    text = browser.js("return document.querySelectorAll('.cells-card output')[1].textContent")
    assert text == f"marked: row 4, column 2; row 1, column 5: {cosine:.2f}"
    untouched = expected(maps, 0, middle, 0, 0)
    np.testing.assert_allclose(shown(browser, 0, 0, 0), untouched, atol=2)


def test_the_arrow_keys_move_the_marked_patch_and_stop_at_the_edge(browser, maps, page):
    browser.js("document.querySelector('.cells-similarity').focus()")
    browser.press("ARROW_UP", "ARROW_RIGHT")
    assert browser.js("return document.querySelector('output').textContent") == "marked: row 2, column 4"
    browser.press(*["ARROW_LEFT"] * 9, *["ARROW_DOWN"] * 9)
    assert browser.js("return document.querySelector('output').textContent") == f"marked: row {ROWS}, column 1"
    np.testing.assert_allclose(shown(browser, 0, 0, 2), expected(maps, 0, (ROWS - 1, 0), 0, 2), atol=2)


@pytest.mark.parametrize("head", [-1, 0, 2])
def test_a_head_can_be_chosen(browser, maps, page, head):
    select = "document.getElementById('cells-head')"
    browser.js(f"{select}.value = '{head}'; {select}.dispatchEvent(new Event('change'))")
    of_head = maps.attention[0].mean(axis=0) if head < 0 else maps.attention[0, head]
    pixels = browser.driver.execute_async_script(PIXELS_OF_ATTENTION)
    np.testing.assert_array_equal(np.reshape(pixels, (ROWS, COLUMNS, 3)), PALETTE[levels(of_head)])
    words = "mean of heads" if head < 0 else f"head {head + 1}"
    assert browser.find(".cells-attention").get_attribute("alt") == f"CLS attention, {words} of class/{EVIL}.png"


def test_dark_and_on_a_phone(browser, page, phone, dark_system):
    dark_system()
    phone()
    browser.open(page)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js("return document.images.length") == 2 * 4, "the class's name is not an image"
