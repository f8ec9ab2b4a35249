"""Patients in a browser: order, filters and search, thumbnails, and nothing run that a file says."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from dinov2.eval.pages.page import write_page
from dinov2.eval.pages.patients import patients_section

EVIL = "<img src=x onerror=alert(1)>"
NAMES = ["APL", EVIL]
PATIENTS = [  # id, label, probability of APL
    ("p10", 0, 0.9),
    ("p9", 0, 0.6),
    (EVIL, 1, 0.2),
    ("wrong", 1, 0.7),
]
SHOWN = (
    "return [...document.querySelectorAll('details:not([hidden]) > summary > b:first-child')].map((e) => e.textContent)"
)


@pytest.fixture
def page(browser, tmp_path):
    for i, colour in enumerate(((250, 10, 10), (10, 10, 250))):
        Image.new("RGB", (30, 30), colour).save(tmp_path / f"{i}.png")

    def write(name, rows):
        with open(tmp_path / name, "w", newline="") as stream:
            csv.writer(stream).writerows(rows)

    columns = [f"p_{name}" for name in NAMES]
    rows = [(i, NAMES[label], NAMES[int(p < 0.5)], p, 1 - p) for i, label, p in PATIENTS]
    write("predictions.csv", [("patient", "label", "prediction", *columns), *rows])
    networks = [(n, i, p + d, 1 - p - d) for i, _, p in PATIENTS for n, d in enumerate((-p / 10, p / 10))]
    write("predictions_of_networks.csv", [("network", "patient", *columns), *networks])
    sources = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), "/gone.png"]
    cells = [
        (i, n, source, w, w, w)
        for i, _, _ in PATIENTS
        for n, (source, w) in enumerate(zip(sources, (0.2, 0.7, 0.1), strict=True))
    ]
    header = ("patient", "cell", "source", "attention", *(f"attention_{name}" for name in NAMES))
    write("attention.csv", [header, *cells])
    shares = (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    removed = [(i, share, 1 - share, 1 - share / 2) for i, _, _ in PATIENTS for share in shares]
    write("deletion.csv", [("patient", "share", "most_attended", "random"), *removed])
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "abmil"}))
    file = tmp_path / "patients.html"
    write_page(file, "patients", [patients_section(tmp_path)])
    browser.open(file)
    return file


def choose(browser, control, value):
    browser.js(
        "const field = document.getElementById('patients-controls').elements[arguments[0]];"
        "field.value = arguments[1]; field.dispatchEvent(new Event('input', { bubbles: true }))",
        control,
        value,
    )


def test_order_filters_and_search(browser, page):
    assert browser.js(SHOWN) == ["wrong", "p9", EVIL, "p10"]
    choose(browser, "order", "name")
    assert browser.js(SHOWN)[1:] == ["p9", "p10", "wrong"], "numbers in names count as numbers"
    choose(browser, "order", "probability")
    assert browser.js(SHOWN) == ["p9", "wrong", EVIL, "p10"]
    choose(browser, "order", "range")
    assert browser.js(SHOWN) == ["p10", "wrong", "p9", EVIL]
    for words, names in {"P1\n": ["p10"], "label <IMG": ["wrong", EVIL], "wrong label": ["wrong"]}.items():
        field = browser.find("#patients-controls [name=search]")
        field.clear()
        field.send_keys(words)
        counted = f"{len(names)} of 4 shown"
        browser.wait(f"document.querySelector('#patients-controls output').textContent === '{counted}'")
        assert browser.js(SHOWN) == names
    assert browser.js("return document.querySelectorAll('img[src=x]').length") == 0


def test_a_patient_opens_by_keyboard_and_shows_the_cells(browser, page, tmp_path):
    browser.js("document.querySelector('.patients-card summary').focus()")
    browser.press("ENTER")
    assert browser.wait("document.querySelector('.patients-card').open")
    order = browser.js("return [...document.querySelector('.images').children].map((e) => e.dataset.cell)")
    assert order == ["1", "0", "2"]
    first = browser.find(".images img")
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", first)
    first.screenshot(str(tmp_path / "thumb.png"))
    colour = np.asarray(Image.open(tmp_path / "thumb.png").convert("RGB"))[10:-10, 10:-10].mean(axis=(0, 1))
    assert colour[2] > 200 > 100 > colour[0], "the most attended cell is the blue one"
    assert "no image" in browser.find(".images li:last-child img").get_attribute("title")


def test_dark_and_on_a_phone(browser, page, phone, dark_system):
    dark_system()
    phone()
    browser.open(page)
    browser.js("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    ends = "return [...document.querySelectorAll('polyline')].map((line) => line.getBoundingClientRect().height)"
    assert min(browser.js(ends)) > 20, "the curves are drawn"
