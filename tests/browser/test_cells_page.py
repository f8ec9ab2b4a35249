"""Cells in a browser: each head's attention, and the similarity to a patch by mouse and by keyboard."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.cell_maps import PALETTE, CellMaps, levels, maps_section
from dinov2.eval.pages.page import write_page

ROWS, COLUMNS = 4, 5
EVIL = "</script><img src=x onerror=alert(1)>"


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
    text = browser.js("return document.querySelectorAll('.card output')[1].textContent")
    assert text == "to row 4, column 2"
    check_colours(browser, maps, 0, middle)


def test_the_arrow_keys_move_the_marked_patch_and_stop_at_the_edge(browser, maps, page):
    browser.js("document.querySelector('.cells-similarity').focus()")
    browser.press("ARROW_UP", "ARROW_RIGHT")
    assert browser.js("return document.querySelector('output').textContent") == "to row 2, column 4"
    browser.press(*["ARROW_LEFT"] * 9, *["ARROW_DOWN"] * 9)
    assert browser.js("return document.querySelector('output').textContent") == f"to row {ROWS}, column 1"
    check_colours(browser, maps, 0, (ROWS - 1, 0))


def test_the_attention_of_each_head_unfolds(browser, maps, page):
    browser.js("document.querySelector('.card summary').focus()")
    browser.press("ENTER")
    for head in range(3):
        alt = f"CLS attention, head {head + 1} of class/{EVIL}.png"
        (image,) = [
            each for each in browser.driver.find_elements("css selector", "details img") if each.accessible_name == alt
        ]
        assert image.is_displayed()
        pixels = Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").split(",")[1]))).convert("RGB")
        np.testing.assert_array_equal(pixels, PALETTE[levels(maps.attention[0, head])])


def test_dark_and_on_a_phone(browser, page, phone, dark_system):
    dark_system()
    phone()
    browser.open(page)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js("return document.images.length") == 2 * (4 + 3), "the class's name is not an image"
