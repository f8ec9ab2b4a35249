"""The embedding explorer in a browser: what a reader sees and exports is what was computed."""

import base64
import csv
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.labelled_cells import LabelledCells
from dinov2.data.sample_cells import CELL_CLASSES, write_sample_cells
from dinov2.eval.explorer import explorer_section
from dinov2.eval.features import Features
from dinov2.eval.features.extract import extract
from dinov2.eval.features.named_encoders import build_encoder
from dinov2.eval.pages.page import write_page
from dinov2.eval.results import FoldPredictions, write_predictions

HTML_NAME = '<img src=x onerror="window.wasRun=1">, "blood" & </script><script>window.wasRun=1</script>'
N_CELLS = 120
MODELS = """
const figure = Bokeh.documents.map((document) => document.get_model_by_name("explorer")).find(Boolean);
const model = (name) => figure.document.get_model_by_name(name);
const part = (name) => document.querySelector(`.explorer [data-part="${name}"]`);
const view = Bokeh.index.roots.find((root) => root.model === figure);
const box = view.canvas_view.el.getBoundingClientRect();
"""
# Bokeh's elements are in shadow trees
DEEP = """
const deep = (root, css) => [...root.querySelectorAll(css), ...[...root.querySelectorAll("*")].flatMap(
  (element) => (element.shadowRoot ? deep(element.shadowRoot, css) : []))];
"""


class Explorer:
    """The explorer of an open page; cells are named by their rows in the features."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        browser.wait("document.documentElement.dataset.charts")
        self.data = browser.js("return JSON.parse(document.querySelector('[data-part=data]').textContent)")
        self.rows = np.array(self.data["rows"])
        self.browser.js(
            "document.querySelector('.explorer-plot').scrollIntoView({block: 'center', behavior: 'instant'})"
        )
        time.sleep(0.2)  # the plot is laid out again

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.js(MODELS + DEEP + script, *arguments)

    def wait(self, script: str) -> Any:
        return self.browser.wait(f"(() => {{ {MODELS} {DEEP} return {script} }})()")

    def part(self, name: str) -> Any:
        return self.browser.find(f".explorer [data-part='{name}']")

    def click(self, element: Any) -> None:
        self.js("arguments[0].click()", element)

    @property
    def points(self) -> np.ndarray:
        """Coordinates of the first projection, [N, 2] by row."""
        projection = self.data["projections"][0]
        return np.stack([projection["x"], projection["y"]], axis=1)[np.argsort(self.rows)]

    def place(self, row: int) -> tuple[float, float]:
        """Where a cell is in the window."""
        x, y = self.points[row]
        scales = "view.frame.x_scale.compute(arguments[0]), view.frame.y_scale.compute(arguments[1])"
        sx, sy, left, top = self.js(f"return [{scales}, box.x, box.y]", x, y)
        return sx + left, sy + top

    def corners(self, *shares: tuple[float, float]) -> list[tuple[float, float]]:
        """Places in the window of shares of the plot's width and height."""
        left, top, width, height = self.js(
            "const { left, top, width, height } = view.frame.bbox; return [box.x + left, box.y + top, width, height]"
        )
        return [(left + u * width, top + v * height) for u, v in shares]

    @property
    def current(self) -> int:
        return int(self.js("return part('cell').dataset.row || -1"))

    def _rows(self, script: str) -> list[int]:
        return sorted(self.rows[self.js(f"return [...{script}]")].tolist())

    @property
    def shown(self) -> list[int]:
        return self._rows("model('cells').view.filter.indices")

    @property
    def selection(self) -> list[int]:
        return self._rows("model('cells').data_source.selected.indices")

    @property
    def span(self) -> float:
        """Width of the view in units of the projection."""
        return self.js("return figure.x_range.end - figure.x_range.start")

    def colour_by(self, column: str) -> None:
        number = [one["id"] for one in self.data["columns"]].index(column)
        script = "part('colour').value = arguments[0]; part('colour').dispatchEvent(new Event('change'))"
        self.js(script, number)

    def search(self, text: str) -> None:
        self.js("part('search').value = arguments[0]; part('search').dispatchEvent(new Event('input'))", text)

    def go_to(self, row: int) -> None:
        """Make a cell the current one by keys: search it, and step to it."""
        self.search(self.data["paths"][list(self.rows).index(row)])
        self.press("ESCAPE", "ARROW_RIGHT")
        self.search("")
        assert self.current == row

    def press(self, *keys: str) -> None:
        self.js("part('plot').focus({preventScroll: true})")
        self.browser.press(*keys)

    def legend(self) -> list:
        return self.browser.driver.find_elements("css selector", "[data-part=legend] label")

    def screenshot(self) -> np.ndarray:
        """The plot as pixels [H, W, 3]."""
        png = base64.b64decode(self.part("plot").screenshot_as_base64)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def n_colours(self) -> int:
        return len(np.unique(self.screenshot().reshape(-1, 3), axis=0))

    def lonely(self) -> int:
        """A cell with no other near it, so that the pointer meets it alone."""
        points = self.points
        apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
        np.fill_diagonal(apart, np.inf)
        apart[[5, 7]] = 0  # these have no image
        return int(apart.min(axis=1).argmax())


def inside(points: np.ndarray, polygon: list) -> list[int]:
    """Positions of the points inside, by the number of crossings."""
    is_inside = np.zeros(len(points), dtype=bool)
    x, y = points.T
    for (x1, y1), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if y1 != y2:
            is_inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return np.flatnonzero(is_inside).tolist()


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Features:
    """Drawn cells with colour histograms; two images are missing, a class and a path are hard to write."""
    root = tmp_path_factory.mktemp("cells")
    write_sample_cells(root, n_train=0, n_probe_train=0, n_probe_test=N_CELLS, n_patients=0, size=40)
    listed = LabelledCells.from_path(root / "probe" / "test.csv")
    features = extract(build_encoder("histogram"), listed.paths).features
    paths = [str(path) for path in listed.paths]
    paths[5] = str(root / "not there" / "=1+1.png")
    paths[7] = str(root / 'a "quoted", Zelle <b>é</b>.png')
    names = [HTML_NAME, "=SUM(A1)", *listed.class_names[2:]]
    return Features(features, listed.labels, names, paths, listed.patients)


@pytest.fixture(scope="module")
def guesses(cells) -> np.ndarray:
    """Predicted classes of half of the cells, every tenth of which is wrong, and -1 of the others."""
    rows = np.arange(N_CELLS)
    return np.where(rows % 2 == 0, (cells.labels + (rows % 10 == 0)) % len(cells.class_names), -1)


@pytest.fixture(scope="module")
def page(cells, guesses, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    probabilities = np.linspace(0, 0.9, N_CELLS)[:, None].repeat(len(cells.class_names), axis=1)
    tested = FoldPredictions([([], np.arange(0, N_CELLS, 2))], guesses, probabilities, [{}])
    write_predictions(folder / "predictions.csv", cells.paths, cells.labels, tested, cells.class_names, cells.patients)
    rows = np.arange(N_CELLS)
    sets = {"one": cells.select(rows < 70), "two": cells.select(rows >= 70)}
    write_page(folder / "explorer.html", "Cells", [explorer_section(sets, folder, with_umap=False)])
    return folder / "explorer.html"


@pytest.fixture
def explorer(browser, page) -> Explorer:
    """The page, its plot in the middle of the window."""
    browser.open(page)
    return Explorer(browser)


def test_the_page_makes_no_request(explorer):
    assert explorer.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


def test_hover_shows_the_cells_image_and_what_is_known_of_it(explorer, cells):
    i = explorer.lonely()
    explorer.browser.mouse(explorer.place(i))
    explorer.wait("deep(document, '.bk-tooltip-content img').length === 1")
    image = explorer.js("return deep(document, '.bk-tooltip-content img')[0]")
    text = explorer.js("return deep(document, '.bk-tooltip-content img')[0].nextElementSibling.textContent")
    assert f"Class: {cells.class_names[cells.labels[i]]}" in text
    assert f"Patient: {cells.patients[i]}" in text
    assert f"Image: {cells.paths[i]}" in text
    # the image is that of the cell: as the page shows it, against the file
    png = base64.b64decode(image.screenshot_as_base64)
    seen = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((40, 40), Image.Resampling.BOX), dtype=float)
    errors = {
        path: np.abs(seen - np.asarray(Image.open(path), dtype=float)).mean()
        for path in cells.paths
        if Path(path).is_file()
    }
    assert min(errors, key=errors.get) == cells.paths[i]
    explorer.browser.mouse((5, 5))
    explorer.wait("deep(document, '.bk-tooltip-content img').every((image) => !image.checkVisibility())")


def test_click_shows_the_nearest_cells_in_feature_space(explorer, cells):
    i = explorer.lonely()
    explorer.browser.mouse(explorer.place(i), "down", "up")
    explorer.wait(f"part('cell').dataset.row === '{i}'")
    distances = np.linalg.norm(cells.features.astype(np.float64) - cells.features[i].astype(np.float64), axis=1)
    distances[i] = np.inf
    expected = np.argsort(distances, kind="stable")[:12]
    buttons = explorer.browser.driver.find_elements("css selector", "[aria-label='Nearest neighbours'] button")
    titles = [f"{cells.class_names[cells.labels[j]]}, {cells.paths[j]}" for j in expected]
    assert [button.get_attribute("title") for button in buttons] == titles
    shown = [float(button.text.split()[0]) for button in buttons]
    np.testing.assert_allclose(shown, distances[expected], rtol=5e-3)
    for button, j in zip(buttons, expected, strict=True):
        assert cells.class_names[cells.labels[j]] in button.text
        assert ("differs" in button.get_attribute("class")) == (cells.labels[j] != cells.labels[i])
    explorer.click(buttons[3])
    assert explorer.current == expected[3]
    explorer.browser.mouse(explorer.corners((0.02, 0.02))[0], "down", "up")  # where no cell is
    explorer.wait("part('cell').dataset.row === ''")


def test_lasso_exports_exactly_the_cells_inside(explorer, cells, guesses):
    explorer.press("l")
    explorer.js(
        "figure.js_event_callbacks = {...figure.js_event_callbacks, selectiongeometry: ["
        "({geometry}) => { window.lassoed = geometry; }]}"
    )
    at = explorer.corners((0.5, 0.1), (0.9, 0.5), (0.6, 0.55), (0.3, 0.9), (0.1, 0.3))
    explorer.browser.mouse(at[0], "down", *at[1:], "up")
    geometry = explorer.wait("window.lassoed")
    expected = inside(explorer.points, list(zip(geometry["x"], geometry["y"], strict=True)))
    assert 10 < len(expected) < N_CELLS - 10
    assert explorer.selection == expected
    explorer.click(explorer.browser.button("Export CSV"))
    raw = explorer.browser.downloaded("selected_cells.csv")
    assert raw.startswith(b"\xef\xbb\xbf")
    assert raw.count(b"\r\n") == len(expected) + 1
    rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))
    assert list(rows[0]) == ["index", "path", "label", "patient", "data_set", "prediction", "x", "y"]
    assert [int(row["index"]) for row in rows] == expected
    for i, row in zip(expected, rows, strict=True):
        label, guess = (cells.class_names[number] if number >= 0 else "" for number in (cells.labels[i], guesses[i]))
        # what a spreadsheet would calculate has an apostrophe before it
        guarded = [f"'{text}" if text.startswith("=") else text for text in (label, guess)]
        assert [row["label"], row["prediction"]] == guarded
        assert row["path"] == cells.paths[i]
        patient, name = cells.patients[i], "one" if i < 70 else "two"
        assert row["patient"] in (patient, f"{patient} ({name})")  # with the name if both sets have such a patient
        assert row["data_set"] == name
        assert (float(row["x"]), float(row["y"])) == tuple(explorer.points[i])


def test_names_with_html_are_text(explorer, cells):
    explorer.go_to(7)
    assert explorer.js("return window.wasRun") is None
    assert HTML_NAME in explorer.part("legend").text
    explorer.click(explorer.legend()[0])  # only this class
    explorer.browser.mouse(explorer.place(int(np.flatnonzero(cells.labels == 0)[0])))
    explorer.wait("deep(document, '.bk-tooltip-content img').length === 1")
    assert HTML_NAME in explorer.js("return deep(document, '.bk-tooltip-content')[0].textContent")
    assert explorer.js("return window.wasRun") is None
    explorer.click(explorer.legend()[0])
    assert "Zelle <b>é</b>.png" in explorer.part("cell").text.replace("\n", "")
    explorer.press(" ")
    explorer.go_to(5)
    explorer.press(" ")
    assert explorer.selection == [5, 7]
    explorer.click(explorer.browser.button("Export CSV"))
    text = explorer.browser.downloaded("selected_cells.csv").decode("utf-8-sig")
    (first, second) = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert first[1].endswith("not there/=1+1.png")
    assert second[1] == cells.paths[7]


def test_a_missing_image_has_a_placeholder_and_a_reason(explorer):
    explorer.go_to(5)
    assert "No image: No such file" in explorer.part("cell").text


def test_filters_and_search_show_what_they_say(explorer, cells):
    all_cells = list(range(N_CELLS))
    assert explorer.shown == all_cells
    entries = explorer.legend()
    assert len(entries) == len(CELL_CLASSES)
    explorer.click(entries[2])
    assert explorer.shown == np.flatnonzero(cells.labels == 2).tolist()
    assert "filtered by Class" in explorer.part("status").text
    explorer.click(entries[0])
    assert explorer.shown == np.flatnonzero(np.isin(cells.labels, [0, 2])).tolist()
    explorer.click(entries[0])
    explorer.click(entries[2])
    assert explorer.shown == all_cells

    patient = cells.patients[30]
    field = explorer.part("search")
    field.send_keys(patient.upper())
    expected = [i for i in all_cells if patient in cells.patients[i] or patient in cells.paths[i]]
    assert explorer.shown == expected
    explorer.click(explorer.browser.button("Select all shown"))
    assert explorer.selection == expected
    field.send_keys("\ue003" * len(patient))  # backspace
    assert explorer.shown == all_cells

    explorer.colour_by("right")
    wrong = next(entry for entry in explorer.legend() if "wrong" in entry.text)
    explorer.click(wrong)
    assert explorer.shown == list(range(0, N_CELLS, 10))
    # what is filtered out can be neither met by the pointer nor caught by the lasso
    explorer.browser.mouse(explorer.place(1), "down", "up")
    assert explorer.current != 1
    explorer.press("l")
    at = explorer.corners((0.01, 0.01), (0.99, 0.01), (0.99, 0.99), (0.01, 0.99))
    explorer.browser.mouse(at[0], "down", *at[1:], "up")
    assert explorer.selection == list(range(0, N_CELLS, 10))


def test_numbers_are_coloured_by_a_scale_and_filtered_by_ranges(explorer):
    explorer.colour_by("probability")
    entries = explorer.legend()
    assert ["0 to 0.1" in entries[0].text, "0.1 to 0.2" in entries[1].text] == [True, True]
    assert "not known" in entries[-1].text
    explorer.click(entries[-1])
    assert explorer.shown == list(range(1, N_CELLS, 2))
    explorer.click(entries[-1])
    explorer.click(entries[0])
    assert explorer.shown == [i for i in range(0, N_CELLS, 2) if np.linspace(0, 0.9, N_CELLS)[i] <= 0.1]
    colours = explorer.js("return model('cells').data_source.data.colour")
    assert len(set(colours)) == len(entries)


def test_the_plot_works_by_keyboard(explorer):
    points = explorer.points
    explorer.press("ARROW_RIGHT")
    first = explorer.current
    assert first >= 0
    explorer.press("ARROW_RIGHT")
    second = explorer.current
    assert points[second, 0] > points[first, 0]
    explorer.press(" ", "ARROW_LEFT", " ")
    assert explorer.current not in (-1, second)
    assert explorer.selection == sorted([second, explorer.current])
    span = explorer.span
    explorer.press(*"++++++++")
    time.sleep(0.5)  # new labels of the axes change nothing
    assert explorer.span == pytest.approx(span / 1.3**8, rel=0.05)
    explorer.press("0")
    assert explorer.span == pytest.approx(span, rel=0.05)
    explorer.press("ESCAPE")
    assert explorer.current == -1


def test_dragging_moves_and_the_wheel_zooms_at_the_pointer(explorer):
    middle = int(np.linalg.norm(explorer.points - np.median(explorer.points, axis=0), axis=1).argmin())
    x, y = explorer.place(middle)
    explorer.browser.mouse((x + 30, y + 30), "down", (x + 60, y + 40), (x + 90, y + 50), "up")
    moved = explorer.place(middle)
    np.testing.assert_allclose(moved, [x + 60, y + 20], atol=2)
    span = explorer.span
    wheel = (
        "view.canvas_view.events_el.dispatchEvent(new WheelEvent('wheel', {view: window, deltaY: -200, "
        "clientX: arguments[0], clientY: arguments[1], bubbles: true, cancelable: true, composed: true}))"
    )
    explorer.js("part('plot').blur()")
    explorer.js(wheel, *moved)
    assert explorer.span == span  # a page that scrolls does not get stuck on the plot
    explorer.js("part('plot').focus({preventScroll: true})")
    explorer.js(wheel, *moved)
    assert explorer.span < span / 1.2
    np.testing.assert_allclose(explorer.place(middle), moved, atol=2)


def test_both_colour_schemes_draw_and_follow_the_button(browser, page, dark_system):
    dark_system()
    browser.open(page)
    explorer = Explorer(browser)
    assert explorer.screenshot()[20, 10].max() < 64
    assert explorer.n_colours() > 20
    browser.js("document.getElementById('theme').click()")
    assert explorer.screenshot()[20, 10].min() > 192
    assert explorer.n_colours() > 20
    browser.js("window.localStorage.clear()")  # where the page remembers the choice


def test_the_page_fits_a_phone(browser, page, phone):
    phone()
    browser.open(page)
    explorer = Explorer(browser)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert explorer.n_colours() > 20


def test_three_cells_of_one_class_without_patients(browser, tmp_path):
    features = Features(
        np.float32([[0, 0], [1, 0], [0, 2]]), np.zeros(3, dtype=np.int64), [""], ["a.png", "a.png", "b.png"]
    )
    page = tmp_path / "three.html"
    write_page(page, "Three", [explorer_section({"": features})])
    browser.open(page)
    explorer = Explorer(browser)
    assert explorer.data["neighbours"][list(explorer.rows).index(0)] == [list(explorer.rows).index(i) for i in (1, 2)]
    explorer.go_to(2)
    explorer.click(browser.button("Select all shown"))
    explorer.click(browser.button("Export CSV"))
    assert browser.downloaded("selected_cells.csv").count(b"\r\n") == 4
    assert "not known" in explorer.part("legend").text


def test_equal_cells_are_drawn(browser, tmp_path):
    for n in (2, 9):
        features = Features(np.ones((n, 3), np.float32), np.zeros(n, dtype=np.int64), ["x"], ["a.png"] * n)
        write_page(tmp_path / f"{n}.html", "Equal", [explorer_section({"": features})])
        browser.open(tmp_path / f"{n}.html")
        explorer = Explorer(browser)
        explorer.press("ARROW_RIGHT", " ")
        assert len(explorer.selection) == 1
        assert explorer.n_colours() > 20


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
    write_page(page, "Many", [explorer_section({"": cells}, thumbnail_size=8, with_umap=False)])
    browser.open(page)
    explorer = Explorer(browser)

    def milliseconds(action: Any) -> float:
        """Until the next frame after the action is drawn."""
        start = time.monotonic()
        action()
        browser.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        return 1000 * (time.monotonic() - start)

    took = {
        "colour": milliseconds(lambda: explorer.colour_by("patient")),
        "search": milliseconds(lambda: explorer.search("patient 1")),
        "zoom": milliseconds(lambda: explorer.press("+")),
        "next cell": milliseconds(lambda: explorer.press("ARROW_RIGHT")),
        "select": milliseconds(lambda: explorer.click(browser.button("Select all shown"))),
    }
    record_property("milliseconds", took)
    with capsys.disabled():
        print("\n20,000 cells, milliseconds:", {name: round(value) for name, value in took.items()})
    expected = [i for i in range(n) if "patient 1" in patients[i]]
    assert explorer.shown == explorer.selection == expected
    assert explorer.current in expected
    assert len(explorer.legend()) == 700
    explorer.search("")
    explorer.click(browser.button("Clear"))
    assert len(explorer.shown) == n
    assert explorer.n_colours() > 100
