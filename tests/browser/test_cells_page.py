"""Cells in a browser: the choice of a head, and the similarity to a patch by mouse and by keyboard."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.cell_maps import PALETTE, CellMaps, levels, maps_section
from dinov2.eval.pages.page import write_page

ROWS, COLUMNS = 4, 5
EVIL = "</script><img src=x onerror=alert(1)>"
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


def shown(browser, cell):
    """Return a function of (row, column) that gives the colour in the middle of a patch."""
    element = browser.driver.find_elements("css selector", ".cells-similarity")[cell]
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    image = np.asarray(Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB"))
    height, width = image.shape[:2]
    return lambda row, column: image[int((row + 0.5) * height / ROWS), int((column + 0.5) * width / COLUMNS)]


def check_colours(browser, maps, cell, marked):
    colour_at = shown(browser, cell)
    for row, column in np.ndindex(ROWS, COLUMNS):
        np.testing.assert_allclose(colour_at(row, column), expected(maps, cell, marked, row, column), atol=2)


def expected(maps, cell, marked, row, column):
    of_marked = maps.similarity[cell, marked[0] * COLUMNS + marked[1]].reshape(ROWS, COLUMNS)
    return PALETTE[levels(of_marked.astype(np.float64))[row, column]].tolist()


def test_a_click_shows_what_is_like_that_patch(browser, maps, page):
    middle = (ROWS // 2, COLUMNS // 2)
    check_colours(browser, maps, 1, middle)
    similarity = browser.driver.find_elements("css selector", ".cells-similarity")[1]
    box = browser.js("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", similarity)
    browser.mouse((box[0] + box[2] * 1.5 / COLUMNS, box[1] + box[3] * 3.5 / ROWS), "down", "up", (1, 1))
    browser.js("document.activeElement.blur()")
    check_colours(browser, maps, 1, (3, 1))
    text = browser.js("return document.querySelectorAll('.cells-card output')[1].textContent")
    assert text == "to row 4, column 2"
    check_colours(browser, maps, 0, middle)


def test_the_arrow_keys_move_the_marked_patch_and_stop_at_the_edge(browser, maps, page):
    browser.js("document.querySelector('.cells-similarity').focus()")
    browser.press("ARROW_UP", "ARROW_RIGHT")
    assert browser.js("return document.querySelector('output').textContent") == "to row 2, column 4"
    browser.press(*["ARROW_LEFT"] * 9, *["ARROW_DOWN"] * 9)
    assert browser.js("return document.querySelector('output').textContent") == f"to row {ROWS}, column 1"
    check_colours(browser, maps, 0, (ROWS - 1, 0))


@pytest.mark.parametrize("head", [-1, 0, 2])
def test_a_head_can_be_chosen(browser, maps, page, head):
    select = "document.getElementById('cells-head')"
    browser.js(f"{select}.value = '{head + 1}'; {select}.dispatchEvent(new Event('change'))")
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
