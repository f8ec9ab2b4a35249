"""Names of classes, patients, files, runs and networks that hold code do nothing in a page but be shown."""

import csv
import io
import json
import sys

import numpy as np
import pytest

from dinov2.eval import knn, report
from dinov2.eval.features import Features, write_features
from dinov2.utils.config import load_run_config, write_config

NAMES = [
    "<script>window.wasRun=1</script>",
    "</script><script>window.wasRun=2</script>",
    "<img src=x onerror=window.wasRun=3>",
    "javascript:window.wasRun=4",
    "\"'` onload='window.wasRun=5' onmouseover=\"window.wasRun=6\"",
    "{{ 7 * 7 }} {% raw %} ${window.wasRun=7} @{thumbnail} $name",
    "</style></textarea><!-- <iframe srcdoc='<script>parent.wasRun=8</script>'>",
    "a\u2028b\u2029c",
    "\u202egnp.exe\u200f",
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "x" * 10_000,
]
FOLDER_NAME = "<img src=x onerror=window.wasRun=9>\"'{{1}}\u202e"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Write a report with every section on cells, patients and a run whose names are odd."""
    folder = tmp_path_factory.mktemp("odd") / FOLDER_NAME
    n = 3 * len(NAMES)
    labels = np.arange(n) % len(NAMES)
    values = (np.random.default_rng(0).normal(size=(n, 4)) + labels[:, None]).astype(np.float32)
    paths = [f"/{NAMES[label]}/{i}.png" for i, label in enumerate(labels)]
    patients = [f"{NAMES[i % len(NAMES)]} {i}" for i in range(n)]
    attributes = dict.fromkeys(("model", "checkpoint", "transform", "checkpoint_sha256"), " ".join(NAMES[:6]))
    write_features(folder / "f.h5", Features(values, labels, NAMES, paths, patients, attributes=attributes))
    flags = ["--features", str(folder / "f.h5"), "--k", "1", "--folds", "3"]
    knn.main([*flags, "--output-dir", str(folder / "knn")])
    abmil = folder / "abmil"
    abmil.mkdir()
    (abmil / "results.json").write_text(json.dumps({"protocol": "abmil", "left_out": {NAMES[0]: NAMES[2]}}))
    columns = [f"p_{name}" for name in NAMES]
    chances = np.full(len(NAMES), 1 / len(NAMES)).tolist()
    with open(abmil / "predictions.csv", "w", newline="", encoding="utf-8") as stream:
        rows = [[f"patient {name}", name, NAMES[0], *chances] for name in NAMES]
        csv.writer(stream).writerows([["patient", "label", "prediction", *columns], *rows])
    run = folder / "run"
    run.mkdir()
    write_config(load_run_config(None, ["train.seed=7", "train.dataset_path=cells"]), run / "config.yaml")
    numbers = [{"iteration": i, "total_loss": 1 / (i + 1), NAMES[0]: i} for i in range(5)]
    (run / "training_metrics.json").write_text("".join(json.dumps(line) + "\n" for line in numbers))
    (run / "bad_images.csv").write_text(f"path,reason\n/{NAMES[2]},{NAMES[3]}\n")
    output = folder.parent / "report.html"
    folders = [str(folder / name) for name in ("run", "knn", "abmil")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "umap", None)  # it takes minutes
        report.main([*folders, "--title", NAMES[1], "--output", str(output)])
    return output


def test_odd_names_do_nothing_but_be_shown(browser, page):
    browser.open(page)
    browser.js("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    text = browser.js("return document.body.textContent")
    for name in NAMES:
        assert name in text
    browser.js(
        "document.querySelectorAll('button, summary, label, td').forEach((element) => {"
        " element.dispatchEvent(new MouseEvent('mouseover', {bubbles: true})); })"
    )
    assert browser.js("return window.wasRun") is None
    assert browser.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    own = (
        "return [...document.querySelectorAll('[onerror], [onload], [onmouseover], [href^=javascript], iframe')].length"
    )
    assert browser.js(own) == 0
    assert browser.driver.title == NAMES[1]


def test_no_exported_cell_is_a_formula(browser, page):
    browser.open(page)
    browser.js("document.querySelector('[data-part=select-shown]').click()")
    browser.wait("!document.querySelector('[data-part=export]').disabled")
    browser.js("document.querySelector('[data-part=export]').click()")
    text = browser.downloaded("selected_cells.csv").decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 3 * len(NAMES)
    texts = [row[name] for row in rows for name in ("path", "label", "patient", "data_set", "prediction")]
    assert {"'=1+1", "'+1", "'-1", "'@SUM(A1)"} <= set(texts)
    assert not [text for text in texts if text.startswith(("=", "+", "-", "@"))]
