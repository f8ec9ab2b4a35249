"""Fixtures of report tests: runs and results as training and kNN write them, and a parser of pages."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bokeh.document import Document
from bokeh.models import Line

from dinov2.eval import knn, report
from dinov2.eval.features import Features, write_features
from dinov2.eval.metrics import classification_metrics
from dinov2.logging import MetricLogger
from dinov2.utils.config import load_run_config, write_config

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, 'lymphocyte, "large"', "Zelle ü β"]


class Page(HTMLParser):
    """A page's ids, headings, elements, JSON, charts and tables; a cell is its text and the values of its <data>."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.headings, self.elements = text, [], [], []
        self.tables, self.json, self.charts = {}, {}, {}
        self._rows, self._caption, self._script, self._into = [], None, {}, None
        self.feed(text)
        self.words = re.sub(
            r"\s+", " ", re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]*>", " ", text, flags=re.S)
        )

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append(SimpleNamespace(text="", values=[], shown=[]))
        elif tag == "data" and self._rows:
            self._rows[-1][-1].values.append(json.loads(attrs["value"]))
            self._rows[-1][-1].shown.append("")
        elif tag == "script":
            self._script = attrs
        elif tag == "figcaption":
            self._caption = None
        self._into = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self._caption], self._rows = self._rows, []
        if tag == "data":
            self._into = "td" if self._rows else None
        elif tag != "script":
            self._into = None
        self._script = {}

    def handle_data(self, data):
        if self._script.get("id", "").startswith("data-"):
            self.json[self._script["id"].removeprefix("data-")] = json.loads(data)
        elif self._script.get("class") == "chart-data":
            (plot,) = Document.from_json(json.loads(data)["doc"]).roots
            lines = [renderer for renderer in plot.renderers if isinstance(renderer.glyph, Line)]
            data = {renderer.name: renderer.data_source.data for renderer in lines}
            self.charts[self._caption] = {name: (columns["x"], columns["y"]) for name, columns in data.items()}
        elif self._into in ("caption", "figcaption"):
            self._caption = (self._caption or "") + data if self._into == "figcaption" else data
        elif self._into in ("td", "th", "data") and self._rows:
            self._rows[-1][-1].text += data
            if self._into == "data":
                self._rows[-1][-1].shown[-1] += data
        elif self._into in ("h1", "h2", "h3", "h4"):
            self.headings.append((self._into, data))

    def table(self, start):
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return {row[0].text: dict(zip([cell.text for cell in found[0]], row, strict=True)) for row in found[1:]}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A run's folder, with numbers written by the logger of the training: {name: value} of each iteration."""

    def make(name, n=8, n_all=8, values=lambda i: {}, evaluations=(), overrides=()):
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        settings = [f"train.OFFICIAL_EPOCH_LENGTH={n_all}", "optim.epochs=1", "optim.warmup_epochs=0", "train.seed=7"]
        write_config(load_run_config(None, [*settings, "train.dataset_path=cells", *overrides]), folder / "config.yaml")
        logger = MetricLogger(folder / "training_metrics.json", 0, n_all, 4, 1)
        for i in range(n):
            on_device = {"total_loss": 10 / (i + 1), "grad_norm_backbone": 10.0**i, "skipped_steps": i // 4}
            numbers = {"lr": 1e-3 * i, "mom": 0.99} | on_device | values(i)
            own = {key: torch.tensor(float(value)) for key, value in numbers.items()}
            logger.update(i, {"wd": 0.04}, own)
        logger.close()
        rng = np.random.default_rng(0)
        for done in evaluations:
            labels = np.arange(30) % 3
            predictions = {f"knn_{k}": np.where(rng.random(30) < 0.6, labels, 2 - labels) for k in (1, 5)}
            metrics = {method: classification_metrics(labels, of_k, NAMES) for method, of_k in predictions.items()}
            results = {"iteration": done, "datasets": {EVIL: {"n_train": 20, "n_test": 30, "knn": metrics}}}
            (folder / "eval" / f"training_{done}").mkdir(parents=True)
            file = folder / "eval" / f"training_{done}" / "results.json"
            file.write_text(json.dumps(results | {"teacher": {"effective_rank": 3.5}}))
        return folder

    return make


@pytest.fixture(scope="module")
def make_results(tmp_path_factory):
    """The folder that kNN leaves for cells of three oddly named classes."""

    def make(name, seed=0, shift=1.0, n=45, flags=("--folds", "3"), data="/data"):
        rng = np.random.default_rng(seed)
        labels = np.arange(n) % 3
        values = (rng.normal(size=(n, 6)) + shift * labels[:, None]).astype(np.float32)
        paths = [f"{data}/{EVIL}/{i:03d}.png" for i in range(n)]
        folder = tmp_path_factory.mktemp("results") / name
        file = folder.with_suffix(".h5")
        attributes = {"checkpoint_sha256": f"{seed}abc", "model": f"ViT {seed}", "checkpoint": f"/{name}.pth"}
        write_features(file, Features(values, labels, NAMES, paths, None, attributes=attributes))
        knn.main(["--features", str(file), "--output-dir", str(folder), "--k", "1", "5", *flags])
        return folder

    return make


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def run(*arguments):
        output = tmp_path_factory.mktemp("page") / "report.html"
        report.main([*map(str, arguments), "--output", str(output)])
        return Page(output.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def run_folder(make_run):
    spikes = {3: {"total_loss": float("nan")}, 5: {"total_loss": float("inf"), "grad_norm_backbone": 0.0}}
    return make_run("run, first", values=lambda i: spikes.get(i, {}), evaluations=(0, 4, 8))


@pytest.fixture(scope="module")
def results(make_results):
    return make_results("knn")


@pytest.fixture(scope="module")
def page(write, run_folder, results):
    return write(run_folder, results, "--no-explorer")
