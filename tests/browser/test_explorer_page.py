"""The embedding explorer in a browser: what a reader sees and exports is what was computed."""

import base64
import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.sample_cells import CELL_CLASSES, write_sample_cells
from dinov2.eval.explorer import ExplorerSettings, explorer_section
from dinov2.eval.explorer_columns import Predictions
from dinov2.eval.features import Features
from dinov2.eval.features.baselines import colour_histogram
from dinov2.eval.pages import write_page

HTML_NAME = '<img src=x onerror="window.wasRun=1">, "blood" & </script><script>window.wasRun=1</script>'
N_CELLS = 120
PLOT_BOX = """
const { x, y, width, height } = document.querySelector(".explorer-plot").getBoundingClientRect();
return [x, y, width, height];
"""
# from a copy: Chromium warns of reading from a canvas that is drawn for the screen
PIXELS = """
const copy = document.createElement("canvas");
Object.assign(copy, { width: explorer.canvas.width, height: explorer.canvas.height });
const pen = copy.getContext("2d", { willReadFrequently: true });
pen.drawImage(explorer.canvas, 0, 0);
const pixels = pen.getImageData(0, 0, copy.width, copy.height).data;
"""


def points_of(data: dict, projection: int = 0) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data["projections"][projection]["points"]), "<f4").reshape(-1, 2)


def inside(points: np.ndarray, polygon: list) -> np.ndarray:
    """Positions of the points inside, by the number of crossings."""
    found = np.zeros(len(points), dtype=bool)
    x, y = points.astype(np.float64).T
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y1 != y2:
            found ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return np.flatnonzero(found)


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Features:
    """Drawn cells with colour histograms; two pictures are missing, a class and a path are hard to write."""
    root = tmp_path_factory.mktemp("cells")
    write_sample_cells(root, n_train=0, n_probe_train=0, n_probe_test=N_CELLS, n_patients=0, size=40)
    listed = LabelledCells.from_path(root / "probe" / "test.csv")
    features = colour_histogram(listed.paths)
    paths = [str(path) for path in listed.paths]
    paths[5] = str(root / "not there" / "=1+1.png")
    paths[7] = str(root / 'a "quoted", Zelle <b>é</b>.png')
    names = [HTML_NAME, "=SUM(A1)", *listed.class_names[2:]]
    return Features(features, listed.labels, names, paths, listed.patients)


@pytest.fixture(scope="module")
def predictions(cells) -> Predictions:
    """Of half of the cells; every tenth is wrong."""
    known = range(0, N_CELLS, 2)
    guesses = [int(cells.labels[i] + (i % 10 == 0)) % len(cells.class_names) for i in known]
    return Predictions(
        "path",
        {cells.paths[i]: cells.class_names[cells.labels[i]] for i in known},
        {cells.paths[i]: cells.class_names[guess] for i, guess in zip(known, guesses, strict=True)},
        {cells.paths[i]: np.full(len(cells.class_names), 0.1) for i in known},
        cells.class_names,
    )


@pytest.fixture(scope="module")
def page(cells, predictions, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    data_sets = ["one" if i < 70 else "two" for i in range(N_CELLS)]
    settings = ExplorerSettings(with_umap=False)
    write_page(path, "Cells", [explorer_section(cells, predictions, data_sets, settings=settings)])
    return path


@pytest.fixture
def opened(browser, page):
    """The page, its plot in the middle of the window."""
    browser.open(page)
    show_plot(browser)
    return browser


def show_plot(browser) -> None:
    browser.js("document.querySelector('.explorer-plot').scrollIntoView({block: 'center', behavior: 'instant'})")
    browser.wait("explorer.view().scale !== 1")


def lonely(browser, points: np.ndarray) -> int:
    """A cell with no other near it, so that the pointer meets it alone."""
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    apart[[5, 7]] = 0  # these have no picture
    return int(apart.min(axis=1).argmax())


def n_colours(browser) -> int:
    """Different colours of the points' canvas."""
    return browser.js(PIXELS + "return new Set(new Uint32Array(pixels.buffer)).size")


def background(browser) -> list[int]:
    """Red, green and blue of its corner."""
    return browser.js(PIXELS + "return Array.from(pixels.slice(0, 3))")


def test_hover_shows_the_cells_picture_and_what_is_known_of_it(opened, page, cells):
    i = lonely(opened, points_of(opened.data(page, "explorer")))
    opened.mouse(tuple(opened.js("return explorer.place(arguments[0])", i)))
    opened.wait(f"explorer.hovered() === {i}")
    tip = opened.find(".explorer-tip")
    assert tip.is_displayed()
    assert cells.class_names[cells.labels[i]] in tip.text
    assert cells.patients[i] in tip.text
    assert cells.paths[i] in tip.text.replace("\n", "")
    # the picture is that of the cell: looked at as the page shows it, against the file
    png = base64.b64decode(tip.find_element("css selector", ".explorer-picture").screenshot_as_base64)
    seen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((40, 40), Image.Resampling.BOX), dtype=float)
    errors = {
        path: np.abs(seen - np.asarray(Image.open(path), dtype=float)).mean()
        for path in cells.paths
        if Path(path).is_file()
    }
    assert min(errors, key=errors.get) == cells.paths[i]
    opened.mouse((5, 5))
    opened.wait("explorer.hovered() === -1")
    assert not tip.is_displayed()


def test_click_shows_the_nearest_cells_in_feature_space(opened, page, cells):
    i = lonely(opened, points_of(opened.data(page, "explorer")))
    opened.mouse(tuple(opened.js("return explorer.place(arguments[0])", i)), "down", "up")
    opened.wait(f"explorer.current() === {i}")
    distances = np.linalg.norm(cells.features.astype(np.float64) - cells.features[i].astype(np.float64), axis=1)
    distances[i] = np.inf
    expected = np.argsort(distances, kind="stable")[:12]
    buttons = opened.driver.find_elements("css selector", "[aria-label='Nearest neighbours'] button")
    assert [int(button.get_attribute("data-cell")) for button in buttons] == expected.tolist()
    shown = [float(button.find_element("css selector", ".number").text) for button in buttons]
    np.testing.assert_allclose(shown, distances[expected], rtol=5e-3)
    opened.js("arguments[0].click()", buttons[3])
    assert opened.js("return explorer.current()") == expected[3]


def test_lasso_exports_exactly_the_cells_inside(opened, page, cells, predictions):
    points = points_of(opened.data(page, "explorer"))
    opened.js("arguments[0].click()", opened.button("Lasso"))
    x, y, width, height = opened.js(PLOT_BOX)
    corners = ((0.5, 0.1), (0.9, 0.5), (0.6, 0.55), (0.3, 0.9), (0.1, 0.3))
    at = [(x + u * width, y + v * height) for u, v in corners]
    opened.mouse(at[0], "down", *at[1:], "up")
    polygon = opened.wait("explorer.lastLasso()")
    expected = inside(points, polygon)
    assert 10 < len(expected) < N_CELLS - 10
    assert opened.js("return explorer.selection()") == expected.tolist()
    opened.js("arguments[0].click()", opened.button("Export CSV"))
    raw = opened.downloaded("selected_cells.csv")
    assert raw.startswith(b"\xef\xbb\xbf")
    assert raw.count(b"\r\n") == len(expected) + 1
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
    assert list(rows[0]) == ["index", "path", "label", "patient", "data_set", "prediction", "x", "y"]
    assert [int(row["index"]) for row in rows] == expected.tolist()
    for i, row in zip(expected, rows, strict=True):
        label, guess = cells.class_names[cells.labels[i]], predictions.predictions.get(cells.paths[i], "")
        # what a spreadsheet would calculate has an apostrophe before it
        guarded = [f"'{text}" if text.startswith("=") else text for text in (label, guess)]
        assert [row["label"], row["prediction"]] == guarded
        assert row["path"] == cells.paths[i]
        assert row["patient"] == cells.patients[i]
        assert row["data_set"] == ("one" if i < 70 else "two")
        assert (np.float32(row["x"]), np.float32(row["y"])) == tuple(points[i])


def test_names_with_html_are_text(opened, cells):
    opened.js("explorer.goTo(7); explorer.select([5, 7])")
    assert opened.js("return window.wasRun") is None
    assert HTML_NAME in opened.find(".explorer-legend").text
    assert "Zelle <b>é</b>.png" in opened.find(".explorer-current").text.replace("\n", "")
    lines = opened.js("return explorer.csv()")
    (first, second) = list(csv.reader(io.StringIO(lines, newline="")))[1:]
    assert first[1].endswith("not there/=1+1.png")
    assert second[1] == cells.paths[7]


def test_a_missing_picture_has_a_placeholder_that_says_why(opened):
    opened.js("explorer.goTo(5)")
    assert "No such file" in opened.find(".explorer-current .explorer-absent").text


def test_filters_and_search_show_what_they_say(opened, cells):
    everyone = list(range(N_CELLS))
    assert opened.js("return explorer.shown()") == everyone
    entries = opened.driver.find_elements("css selector", ".explorer-legend li")
    assert len(entries) == len(CELL_CLASSES)
    opened.js("arguments[0].click()", entries[0].find_element("css selector", "input"))
    assert opened.js("return explorer.shown()") == np.flatnonzero(cells.labels != 0).tolist()
    opened.js("arguments[0].click()", entries[2].find_element("css selector", "button"))  # only
    assert opened.js("return explorer.shown()") == np.flatnonzero(cells.labels == 2).tolist()
    opened.js("arguments[0].click()", opened.button("All"))

    patient = cells.patients[30]
    field = opened.find(".explorer-bar input[type=search]")
    field.send_keys(patient.upper())
    expected = [i for i in everyone if patient in cells.patients[i] or patient in cells.paths[i]]
    assert opened.js("return explorer.shown()") == expected
    opened.js("arguments[0].click()", opened.button("Select all shown"))
    assert opened.js("return explorer.selection()") == expected
    field.send_keys("\ue003" * len(patient))  # backspace
    assert opened.js("return explorer.shown()") == everyone

    opened.js("explorer.setColumn('right')")
    wrong = opened.driver.find_elements("css selector", ".explorer-legend li")[1]
    assert "wrong" in wrong.text
    opened.js("arguments[0].click()", wrong.find_element("css selector", "button"))
    assert opened.js("return explorer.shown()") == list(range(0, N_CELLS, 10))
    # what is filtered out can be neither met by the pointer nor caught by the lasso
    opened.js("explorer.selectInside([[-9, -9], [9, -9], [9, 9], [-9, 9]])")
    assert opened.js("return explorer.selection()") == list(range(0, N_CELLS, 10))
    assert opened.js("return explorer.pick(...explorer.place(1))") != 1


def test_numbers_are_coloured_by_a_scale_and_filtered_by_a_range(opened):
    opened.js("explorer.setColumn('probability')")
    boxes = opened.driver.find_elements("css selector", ".explorer-range input")
    assert len(boxes) == 2
    without = opened.driver.find_elements("css selector", ".explorer-side .card:first-child input[type=checkbox]")[0]
    opened.js("arguments[0].click()", without)
    assert opened.js("return explorer.shown()") == list(range(0, N_CELLS, 2))
    boxes[0].clear()
    boxes[0].send_keys("0.5", "\t")
    assert opened.js("return explorer.shown()") == []


def test_the_plot_works_by_keyboard(opened, page):
    points = points_of(opened.data(page, "explorer"))
    opened.js("document.querySelector('.explorer-plot').focus()")
    opened.press("ARROW_RIGHT")
    first = opened.js("return explorer.current()")
    assert first >= 0
    opened.press("ARROW_RIGHT")
    second = opened.js("return explorer.current()")
    assert points[second, 0] > points[first, 0]
    near = opened.js("return explorer.neighbours(arguments[0])", second)
    opened.press("n")
    assert opened.js("return explorer.current()") == near[0]
    opened.press("n")
    assert opened.js("return explorer.current()") == near[1]
    opened.press(" ")
    assert opened.js("return explorer.selection()") == [near[1]]
    scale = opened.js("return explorer.view().scale")
    opened.press("+")
    assert opened.js("return explorer.view().scale") > scale
    opened.press("0")
    assert opened.js("return explorer.view().scale") == pytest.approx(scale)
    opened.press("ESCAPE")
    assert opened.js("return explorer.current()") == -1


def test_dragging_moves_and_the_wheel_zooms_at_the_pointer(opened):
    x, y = opened.js("return explorer.place(3)")
    opened.mouse((x + 30, y + 30), "down", (x + 60, y + 40), (x + 90, y + 50), "up")
    moved = opened.js("return explorer.place(3)")
    np.testing.assert_allclose(moved, [x + 60, y + 20], atol=2)
    scale = opened.js("return explorer.view().scale")
    opened.js(
        "document.querySelector('.explorer-plot').dispatchEvent(new WheelEvent('wheel', {deltaY: -200, clientX: "
        "arguments[0], clientY: arguments[1], bubbles: true, cancelable: true}))",
        *moved,
    )
    assert opened.js("return explorer.view().scale") > 1.2 * scale
    np.testing.assert_allclose(opened.js("return explorer.place(3)"), moved, atol=1)  # of whole pixels


def test_both_colour_schemes_draw_and_follow_the_button(browser, page, dark_system):
    dark_system()
    browser.open(page)
    show_plot(browser)
    assert max(background(browser)) < 64
    assert n_colours(browser) > 20
    browser.js("document.getElementById('theme').click(); explorer.draw()")
    assert min(background(browser)) > 192
    assert n_colours(browser) > 20
    browser.js("window.localStorage.clear()")  # where the page remembers the choice


def test_pictures_stand_for_points_when_near(opened):
    before = n_colours(opened)
    opened.js("arguments[0].click()", opened.button("Pictures when near"))
    deadline = time.monotonic() + 10
    while n_colours(opened) < 5 * before:  # the sheet is decoded first
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_fits_a_phone(browser, page, phone):
    phone()
    browser.open(page)
    show_plot(browser)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js("return explorer.canvas.width") > 600  # sharp: two pixels for each of the page's
    assert n_colours(browser) > 20


def test_three_cells_of_one_class_without_patients(browser, tmp_path):
    features = Features(
        np.float32([[0, 0], [1, 0], [0, 2]]), np.zeros(3, dtype=np.int64), [""], ["a.png", "a.png", "b.png"]
    )
    page = tmp_path / "three.html"
    write_page(page, "Three", [explorer_section(features)])
    browser.open(page)
    show_plot(browser)
    assert browser.js("return explorer.neighbours(0)") == [1, 2]
    browser.js("explorer.goTo(2); explorer.select([0, 1, 2])")
    assert browser.js("return explorer.csv().split('\\r\\n').length") == 5
    assert "(no name)" in browser.find(".explorer-legend").text


def test_equal_cells_and_one_cell_are_drawn(browser, tmp_path):
    for n in (1, 5):
        features = Features(np.ones((n, 3), np.float32), np.zeros(n, dtype=np.int64), ["x"], ["a.png"] * n)
        write_page(tmp_path / f"{n}.html", "Equal", [explorer_section(features)])
        browser.open(tmp_path / f"{n}.html")
        browser.wait("explorer.draw() > 0 || explorer.canvas.width > 300")
        assert n_colours(browser) > 1
        browser.js("explorer.goTo(0); explorer.select([0])")


def test_twenty_thousand_cells(browser, tmp_path, record_property, capsys):
    """All that a reader does works; how long it takes is printed, and depends on the machine."""
    rng = np.random.default_rng(0)
    n, n_classes = 20_000, 60
    labels = rng.integers(0, n_classes, n)
    features = (rng.normal(size=(n_classes, 6))[labels] + rng.normal(scale=0.4, size=(n, 6))).astype(np.float32)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "cell.png")
    names = [f"class {i}" for i in range(n_classes)]
    patients = [f"patient {i % 700}" for i in range(n)]
    cells = Features(features, labels, names, [str(tmp_path / "cell.png")] * n, patients)
    page = tmp_path / "many.html"
    settings = ExplorerSettings(thumbnail_size=8, with_umap=False)
    write_page(page, "Many", [explorer_section(cells, settings=settings)])
    browser.open(page)
    show_plot(browser)
    box = browser.js(PLOT_BOX)
    polygon = browser.js(
        "const v = explorer.view(); const r = 200 / v.scale;"
        "return Array.from({length: 100}, (_, i) => [v.x + r * Math.cos(i / 15.9), v.y + r * Math.sin(i / 15.9)])"
    )
    milliseconds = browser.js(
        """
        const [polygon, [left, top, width, height]] = arguments;
        const median = (times, action) => {
          const found = Array.from({ length: times }, (_, i) => {
            const start = performance.now();
            action(i);
            return performance.now() - start;
          });
          return found.sort((a, b) => a - b)[times >> 1];
        };
        return {
          redraw: median(21, () => explorer.draw()),
          pick: median(21, (i) => {
            for (let j = 0; j < 100; j += 1) {
              explorer.pick(left + ((37 * j * (i + 1)) % width), top + ((53 * j + 7 * i) % height));
            }
          }) / 100,
          lasso: median(5, () => explorer.selectInside(polygon)),
          search: median(5, (i) => explorer.search(i % 2 ? "patient 1" : "")),
        };
        """,
        polygon,
        box,
    )
    record_property("milliseconds", milliseconds)
    with capsys.disabled():
        print("\n20,000 cells, milliseconds:", {name: round(value, 3) for name, value in milliseconds.items()})
    assert n_colours(browser) > 100
    points = points_of(browser.data(page, "explorer"))
    expected = inside(points, polygon)
    assert len(expected) > 1000
    assert browser.js("return explorer.selection()") == expected.tolist()
    browser.js("explorer.search(''); explorer.setColumn('patient'); explorer.select([])")
    assert len(browser.driver.find_elements("css selector", ".explorer-legend li")) == 300  # and a field to find others
    assert browser.find("[aria-label='Find an entry']").is_displayed()
    assert n_colours(browser) > 100
