"""Fixtures: files of cells and knn.py on them; for report tests runs, results and a parser of pages."""

import csv
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bokeh.document import Document
from bokeh.models import Line
from PIL import Image

from dinov2.eval import knn, report
from dinov2.eval.features import Features, write_features
from dinov2.eval.metrics import classification_metrics
from dinov2.logging import MetricLogger
from dinov2.models import architecture, build_backbone
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
        (rows,) = [content for caption, content in self.tables.items() if caption.startswith(start)]
        return {row[0].text: dict(zip([cell.text for cell in rows[0]], row, strict=True)) for row in rows[1:]}


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


# --- cells -----------------------------------------------------------------------------------------------------------

COLOURS = {"basophil": (150, 60, 160), "eosinophil": (220, 120, 90), "lymphocyte": (90, 90, 200)}


@pytest.fixture
def features_file():
    """Write a features file of cells of two classes, a dozen numbers each, which mostly can be told apart."""

    def write(file, n=80, patients=None, prefix="/cells", **changes):
        rng = np.random.default_rng(0)
        labels = changes.pop("labels", np.arange(n) % 2)
        cells = {
            "features": (rng.normal(size=(n, 12)) + labels[:, None]).astype(np.float32),
            "labels": labels,
            "class_names": ["blast", "monocyte"],
            "paths": [f"{prefix}/{i}.png" for i in range(n)],
            "patients": patients,
            "attributes": {"checkpoint_sha256": "ab", "transform": "28 px"},
        }
        write_features(file, Features(**{**cells, **changes}))
        return file

    return write


@pytest.fixture
def rows_of():
    def read(file):
        with open(file, newline="") as stream:
            return list(csv.DictReader(stream))

    return read


@pytest.fixture
def checkpoint(tmp_path):
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 14, "img_size": 28, "layerscale": 1.0}
    torch.manual_seed(0)
    model = build_backbone({**settings, "block_chunks": 0})
    file = tmp_path / "teacher_checkpoint.pth"
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": state, "architecture": architecture(model)}, file)
    return file


@pytest.fixture(scope="session")
def draw_cells():
    def draw(folder, n, seed):
        """n noisy 30-px images of each class, coloured by class."""
        rng = np.random.default_rng(seed)
        for name, colour in COLOURS.items():
            (folder / name).mkdir(parents=True)
            for i in range(n):
                noisy = np.array(colour) + rng.integers(-15, 15, (30, 30, 3))
                Image.fromarray(noisy.astype(np.uint8)).save(folder / name / f"{i:02d}.png")
        return folder

    return draw


@pytest.fixture
def run_knn(tmp_path, capsys):
    """Run knn.py; return what it prints and results.json."""

    def run(*flags):
        knn.main([*map(str, flags), "--output-dir", str(tmp_path / "out"), "--num-workers", "0", "--device", "cpu"])
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


@pytest.fixture
def expect_nothing(tmp_path, run_knn):
    """Check that knn.py fails with a message and leaves no output folder."""

    def expect(message, *flags, error=ValueError):
        with pytest.raises(error, match=message):
            run_knn(*flags)
        assert not (tmp_path / "out").exists()

    return expect
