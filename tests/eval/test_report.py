"""The report: its numbers are those of the files, it takes whatever runs and evaluations leave, and stays one file."""

import json
import math
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2
from dinov2.eval import abmil, explorer, knn, report
from dinov2.eval.features import Features, write_features
from dinov2.eval.knn import evaluate_knn
from dinov2.logging import MetricLogger
from dinov2.models.vision_transformer import vit_small
from dinov2.utils.command import exit_code
from dinov2.utils.config import load_run_config, write_config
from dinov2.utils.run_status import RunStatus

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, 'lymphocyte, "large"', "Zelle ü β"]


class Page(HTMLParser):
    """Ids, headings, JSON blocks and tables of a page; a cell is its text and the values of its <data> elements."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text, self.ids, self.headings, self.tables, self.json, self.elements = text, [], [], {}, {}, []
        self._rows, self._caption, self._json_id, self._into = [], None, None, None
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
        elif tag == "data":
            self._rows[-1][-1].values.append(json.loads(attrs["value"]))
            self._rows[-1][-1].shown.append("")
        elif tag == "script" and attrs.get("type") == "application/json":
            self._json_id = attrs["id"].removeprefix("data-")
        self._into = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self._caption] = self._rows
        if tag == "data":
            self._into = "td"
        elif tag != "script":
            self._into = None
        self._json_id = None if tag == "script" else self._json_id

    def handle_data(self, data):
        if self._json_id:
            self.json[self._json_id] = json.loads(data)
        elif self._into == "caption":
            self._caption = data
        elif self._into in ("td", "th", "data"):
            self._rows[-1][-1].text += data
            if self._into == "data":
                self._rows[-1][-1].shown[-1] += data
        elif self._into in ("h1", "h2", "h3", "h4"):
            self.headings.append((self._into, data))

    def table(self, start):
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return {row[0].text: dict(zip([cell.text for cell in found[0]], row, strict=True)) for row in found[1:]}


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch):
    monkeypatch.setattr(abmil, "DEFAULTS", abmil.AbmilOptions(training=abmil.TrainingSettings(epochs=2)))


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
            features = rng.normal(size=(30, 4)) + labels[:, None]
            found = evaluate_knn(features[:20], labels[:20], features[20:], labels[20:], NAMES, [1, 5])
            results = {"iteration": done, "datasets": {EVIL: {"n_train": 20, "n_test": 10, "knn": found}}}
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


def read(folder):
    return json.loads((folder / "results.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def test_numbers_of_results_come_back_out_of_the_page(page, results):
    written = read(results)
    (embedded,) = page.json["results"]["results"]
    assert embedded["report"] == written
    table = {row["method"].text: row for row in page.table("knn: all protocols").values()}
    assert list(table) == ["knn_1", "knn_5"]
    columns = {"accuracy": "accuracy, %", "balanced_accuracy": "balanced acc., %", "weighted_f1": "weighted F1, %"}
    columns |= {"macro_f1": "macro F1, %", "kappa": "Cohen's kappa, %", "auroc": "AUROC, %"}
    for method, row in table.items():
        metrics = written["results"]["model"][method]
        for metric, column in columns.items():
            numbers = [metrics[metric], *metrics["intervals"][metric]]
            assert row[column].values == numbers
            assert row[column].shown == [f"{100 * number:.1f}" for number in numbers]
        assert row["log loss"].shown[0] == f"{metrics['log_loss']:.3f}"
        classes = page.table(f"Classes, knn: {method}")
        assert list(classes) == NAMES
        for name, of_class in metrics["per_class"].items():
            assert classes[name]["support"].values == [of_class["support"]]
            assert classes[name]["recall, %"].shown == [f"{100 * of_class['recall']:.1f}"]
        confusion = page.table(f"Confusion, knn: {method}")
        assert [[row[name].values[0] for name in NAMES] for row in confusion.values()] == metrics["confusion"]


def test_numbers_of_a_run_come_back_out_of_the_page(page, run_folder):
    rows = lines(run_folder)
    embedded = page.json["curves"]["runs"]["run, first"]
    assert embedded["iterations"] == len(rows) == 8
    assert set(embedded["columns"]) == set(rows[0]) - {"iteration"}
    for name, column in embedded["columns"].items():
        assert column["iteration"] == list(range(8))
        assert column["value"] == ["NaN" if row[name] is None else row[name] for row in rows]
    shown = page.table("All losses together")
    for row in rows:
        cell = shown[str(row["iteration"])]["run, first"]
        if row["total_loss"] is None:
            assert cell.text == "not a number"
        else:
            assert cell.values == [row["total_loss"]]
            assert cell.shown == [f"{row['total_loss']:.5g}"]
    newest = json.loads((run_folder / "eval" / "training_8" / "results.json").read_text())["datasets"][EVIL]["knn"]
    teachers = page.json["teachers"]["runs"]["run, first"]
    assert list(teachers) == ["0", "4", "8"]
    assert teachers["8"]["datasets"][EVIL]["knn_5"]["accuracy"] == newest["knn_5"]["accuracy"]
    found = {(row[2].text, row[3].text): row for row in page.tables[next(c for c in page.tables if "Newest" in c)][1:]}
    assert found[EVIL, "knn_5"][4].values == [newest["knn_5"]["accuracy"]]
    assert page.json["health"]["runs"]["run, first"]["skipped_steps"] == 1


def test_the_page_is_whole_and_safe(page, run_folder, results):
    assert len(page.ids) == len(set(page.ids))
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert [attrs for tag, attrs in page.elements if tag == "img"] == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    addresses = [attrs[key] for tag, attrs in page.elements for key in ("src", "href") if key in attrs]
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    captions = page.text.count("<caption>")
    assert captions == page.text.count("<table>") > 10
    pictures = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) > 5
    assert all(attrs["aria-label"] for attrs in pictures)
    for section in ("At a glance", "Results", "Training curves", "Teachers during training", "Health of the runs"):
        assert ("h2", section) in page.headings
    assert str(run_folder) in page.words
    assert len(page.text) < 600_000


def test_settings_and_their_difference_from_the_default(page):
    table = page.table("Settings that differ")
    assert table["train.seed"]["default"].text == "0"
    assert table["train.seed"]["run, first"].text == "7"
    assert "optim.base_lr" not in table
    assert "base_lr:" in page.text  # all of config.yaml, folded away


def test_origins_are_told(page, results):
    row = page.table("Results: date")["knn"]
    written = read(results)
    assert row["date"].text == written["date"]
    assert row["seed"].text == "0"
    assert f"dinov2 {dinov2.__version__}" in row["versions"].text
    assert row["sha256 of the weights"].text == "0abc"
    assert written["hashes"]["features"] in page.text


def test_results_of_the_same_cells_stand_side_by_side(write, make_results, results):
    other = make_results("better", seed=1, shift=3.0, data="/elsewhere")  # the same cells, in another place
    page = write(results, other, "--no-explorer")
    rows = page.table("knn_5: side by side")
    assert list(rows) == ["knn", "better"]
    for name, folder in (("knn", results), ("better", other)):
        metrics = read(folder)["results"]["model"]["knn_5"]
        assert rows[name]["balanced acc., %"].values == [
            metrics["balanced_accuracy"],
            *metrics["intervals"]["balanced_accuracy"],
        ]
    assert "do not compare" not in page.words
    assert "Not all of these compare" not in page.words
    assert len(page.json["comparison"]["groups"]) == 2


def test_paired_difference_is_that_of_compare(write, make_results, results):
    other = make_results("paired", seed=2, shift=3.0)
    page = write(results, other, "--no-explorer")
    row = page.table("knn_5: difference to knn")["paired"]
    (difference,) = {row["balanced acc., points"].values[0]}
    metrics = [read(folder)["results"]["model"]["knn_5"]["balanced_accuracy"] for folder in (results, other)]
    assert math.isclose(difference, metrics[1] - metrics[0], abs_tol=1e-12)
    assert 0 <= row["p"].values[0] <= 1


@pytest.mark.parametrize("change", ["cells", "split", "predictions"])
def test_other_cells_or_splits_are_not_compared_in_silence(write, make_results, results, tmp_path, change):
    if change == "predictions":  # of which nobody knows whether they belong to results.json
        other = tmp_path / "other"
        shutil.copytree(results, other)
        for file in other.glob("predictions*.csv"):
            file.write_text(file.read_text() + "x.png,a,a,0,1,0,0\n")
    else:
        how = {"n": 48} if change == "cells" else {"flags": ("--folds", "3", "--seed", "4")}
        other = make_results("other", **how)
    page = write(results, other, "--no-explorer")
    assert "Not all of these compare." in page.words
    assert list(page.table("knn_5 (1 of 2): side by side")) == ["knn"]
    assert list(page.table("knn_5 (2 of 2): side by side")) == ["other"]


def test_other_settings_are_told(write, results, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(results, other)
    content = read(other)
    content["settings"]["temperature"] = 0.5
    (other / "results.json").write_text(json.dumps(content))
    page = write(results, other, "--no-explorer")
    assert "temperature: knn 0.07; other 0.5" in page.words


def test_a_run_still_going_is_no_error(write, make_run, results):
    folder = make_run("going", n=5, n_all=20)
    with open(folder / "training_metrics.json", "a") as file:
        file.write('{"iteration": 5, "total_lo')
    page = write(folder)
    row = page.table("Training runs")["going"]
    assert "5 of 20 iterations" in row["state"].text
    assert "going on, or stopped" in row["state"].text
    assert row["state"].values == [5, 20]
    assert "left out" not in page.words
    assert ("h2", "Teachers during training") not in page.headings


def test_lines_in_the_middle_that_are_broken_are_counted(write, make_run):
    folder = make_run("broken", n=4)
    text = (folder / "training_metrics.json").read_text().splitlines()
    text[1] = text[1][:20]
    text.insert(3, text[0])  # an iteration that stands twice
    (folder / "training_metrics.json").write_text("\n".join([*text, "[]", ""]))
    page = write(folder / "training_metrics.json")
    assert "1 lines are no JSON object" in page.words
    assert page.json["curves"]["runs"]["broken"]["columns"]["lr"]["iteration"] == [0, 2, 3]


def test_a_run_that_has_written_nothing_yet(write, make_run):
    folder = make_run("young", n=0)
    (folder / "logs").mkdir()
    page = write(folder)
    assert "0 of 8 iterations" in page.table("Training runs")["young"]["state"].text
    assert "No iteration has been written yet" in page.words


def test_faults_of_a_run_are_told(write, make_run):
    folder = make_run("faulty")
    status = RunStatus(
        rollbacks=1,
        resumed=1,
        warnings={f"cannot read {EVIL}": 2, "stuck: went back to iteration 4": 1},
        starts=[{"seed": "7", "dinov2": "9.9", "commit": "abc123", "torch": "2.10"}],
    )
    (folder / "status.json").write_text(json.dumps(asdict(status)))
    (folder / "bad_images.csv").write_text(f'path,reason\n"a, ""b"".png",{EVIL}\n')
    (folder / "config.yaml").write_text("train: [unclosed")
    page = write(folder)
    row = page.table("State and faults")["faulty"]
    found = [row[name].text for name in ("rollbacks", "resumed", "unreadable pictures", "warnings")]
    assert found == ["1", "1", "1", "3"]
    assert page.table("faulty: warnings of the log")[f"cannot read {EVIL}"]["times"].text == "2"
    assert page.table("faulty: unreadable pictures")['a, "b".png']["reason"].text == EVIL
    assert page.table("Training runs: what")["faulty"]["commit"].text == "abc123"
    assert "config.yaml is not readable" in page.words


def test_crops_and_masks_are_shown_from_the_first_and_the_newest(write, make_run, tmp_path):
    folder = make_run("seen")
    (folder / "views").mkdir()
    png = b"\x89PNG\r\n\x1a\n"
    for name in ("crops_0", "crops_4", "crops_12", "masks_4"):
        (folder / "views" / f"{name}.png").write_bytes(png + name.encode())
    (folder / "views" / "huge_1.png").write_bytes(bytes(4_000_000))
    page = write(folder)
    pictures = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    shown = ("Crops, iteration 0", "Crops, iteration 12", "Masks, iteration 4")
    assert pictures == [f"{what} of a training batch" for what in shown]
    assert "too many for the page" in page.words


def test_several_runs_share_charts(write, make_run, run_folder):
    other = make_run("second", n=6, evaluations=(4,), overrides=["optim.base_lr=0.5"])
    file = other / "eval" / "training_4" / "results.json"
    file.write_text(file.read_text().replace('"n_test": 10', '"n_test": 11'))
    page = write(run_folder, other)
    rows = page.table("All losses together")
    assert list(rows["0"]) == ["iteration", "run, first", "second"]
    assert rows["7"]["second"].text == ""
    table = page.table("Settings that differ")["optim.base_lr"]
    assert (table["run, first"].text, table["second"].text) == (table["default"].text, "0.5")
    assert "differ between the runs, and their numbers do not compare" in page.words


def test_results_of_another_version_are_read_as_far_as_they_go(write, tmp_path):
    metrics = {"accuracy": 0.5, "new_score": 0.7, "intervals": {"accuracy": [0.4]}, "per_class": {"a": {"support": 3}}}
    content = {"protocol": "knn", "results": {"model": {"knn_3": metrics}}, "versions": {"dinov2": "99.0"}, "new": 1}
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = write(tmp_path / "results.json")
    row = next(iter(page.table(f"{tmp_path.name}: all protocols").values()))
    assert row["accuracy, %"].text == "50.0"
    assert row["macro F1, %"].text == "missing"
    assert row["AUROC, %"].text == "–"
    for note in ("version 99.0 wrote it", "do not know: new", "does not know are left out: new_score"):
        assert note.replace("do not know", "does not know are left out") in page.words
    assert page.table("Classes,")["a"]["recall, %"].text == "missing"


def test_an_unknown_protocol_is_shown_as_found(write, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "new", "results": {"deep": {"x": {"accuracy": 1}}}}))
    row = next(iter(write(tmp_path).table(f"{tmp_path.name}: all protocols").values()))
    assert row["method"].text == "deep x"
    assert row["accuracy, %"].text == "100.0"


def test_one_class_and_three_cells(write, tmp_path):
    metrics = {"accuracy": 1.0, "balanced_accuracy": 1.0, "weighted_f1": 1.0, "macro_f1": 1.0, "kappa": None}
    metrics |= {"per_class": {"only": {"support": 3, "recall": 1.0, "precision": 1.0, "f1": 1.0}}, "confusion": [[3]]}
    (tmp_path / "results.json").write_text(json.dumps({"protocol": "knn", "results": {"model": {"knn_1": metrics}}}))
    page = write(tmp_path)
    row = next(iter(page.table(f"{tmp_path.name}: all protocols").values()))
    assert row["Cohen's kappa, %"].text == "–"
    assert page.table("Confusion")["only"]["only"].values == [3]


def test_patients_and_data_sets_against_each_other(write, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(12) % 2
    values = rng.normal(size=(48, 4)).astype(np.float32) + np.repeat(labels, 4)[:, None]
    patients = [f"p {i // 4}" for i in range(48)]
    paths = [f"/{i}.png" for i in range(48)]
    write_features(tmp_path / "f.h5", Features(values, np.repeat(labels, 4), NAMES[:2], paths, patients))
    flags = ["--features", str(tmp_path / "f.h5"), "--output-dir", str(tmp_path / "abmil"), "--protocol", "crossval"]
    abmil.main([*flags, "--folds", "3", "--runs", "1"])
    entry = {"n_train": 5, "n_test": 4, "accuracy": 0.5, "balanced_accuracy": 0.25, "weighted_f1": 0.5}
    entry |= {"macro_f1": 0.5, "intervals": {"balanced_accuracy": [0.1, 0.9]}, "reason": None}
    none = {"n_train": 0, "n_test": 0, "balanced_accuracy": None, "reason": "too few", "intervals": {}}
    crossed = {"matrix": {"a": {"a": entry, EVIL: none}}, "leave_one_out": {"a": entry}, "batch_effect": None}
    (tmp_path / "cross").mkdir()
    content = {"protocol": "cross", "results": crossed | {"batch_effect_reason": "one patient"}, "class_names": NAMES}
    (tmp_path / "cross" / "results.json").write_text(json.dumps(content))
    page = write(tmp_path, "--no-explorer")  # a folder of both
    row = page.table("abmil: all protocols")["abmil classwise"]
    metrics = read(tmp_path / "abmil")["results"]["classwise"]["together"]
    assert row["accuracy, %"].values[0] == metrics["accuracy"]
    assert ("h2", "Patients of abmil") in page.headings
    pairs = page.table("cross: every pair")
    assert pairs["a → a"]["balanced acc., %"].shown == ["25.0", "10.0", "90.0"]
    assert pairs[f"a → {EVIL}"]["why there is no number"].text == "too few"
    assert pairs["all others → a"]["accuracy, %"].values == [0.5]
    assert "one patient" in page.words


def test_the_same_folder_twice_is_reported_once(write, results, run_folder):
    page = write(results, results / "results.json", run_folder, run_folder / ".." / run_folder.name, "--no-explorer")
    assert len(page.json["results"]["results"]) == 1
    assert list(page.json["curves"]["runs"]) == ["run, first"]
    assert ("h2", "Comparison") not in page.headings


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / "a" / "knn", tmp_path / "b" / "knn", tmp_path / "c"]
    assert report.short_names([*folders, tmp_path / "c"]) == ["a/knn", "b/knn", "c", "c"]


def test_wrong_arguments_say_what_was_looked_for(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(report, "setup_logging", lambda: None)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    (tmp_path / "empty").mkdir()
    texts = {"empty": "training_metrics.json", "notes.txt": "results.json", "gone": "no file or folder"}
    texts["broken"] = "not readable as JSON"
    output = tmp_path / "out.html"
    for name, text in texts.items():
        caplog.clear()
        assert exit_code(lambda name=name: report.main([str(tmp_path / name), "--output", str(output)])) == 2
        assert text in caplog.text
        assert name in caplog.text
        assert not output.exists()


def test_long_runs_are_thinned_and_keep_their_spikes(write, make_run):
    folder = make_run("long", n=1, n_all=100_000)
    row = lines(folder)[0]
    with open(folder / "training_metrics.json", "w") as file:
        for i in range(20_000):
            own = {"iteration": i, "total_loss": 88.25 if i == 12_345 else 1.0 + i % 7}
            file.write(json.dumps(row | own) + "\n")
    page = write(folder)
    column = page.json["curves"]["runs"]["long"]["columns"]["total_loss"]
    assert column["value"][column["iteration"].index(12_345)] == 88.25
    assert page.table("All losses together")["12345"]["long"].values == [88.25]
    assert len(column["value"]) < 1_000
    assert len(page.text) < 600_000


def test_cells_are_shown_as_the_first_network_sees_them(write, make_run, tmp_path):
    folder = make_run("with teacher")
    network = vit_small(patch_size=14, img_size=28, embed_dim=64, depth=1, num_heads=1)  # 64 a head, as usual
    weights = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    (folder / "eval" / "training_8").mkdir(parents=True)
    torch.save({"teacher": weights}, folder / "eval" / "training_8" / "teacher_checkpoint.pth")
    (tmp_path / "cells" / "a").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "cells" / "a" / "1.png")
    page = write(folder, "--cells", tmp_path / "cells")
    assert {"cells", "data-cells"} <= set(page.ids)
    assert any(attrs["src"].startswith("data:image/") for tag, attrs in page.elements if tag == "img")


def test_cells_without_a_network_say_what_to_add(write, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="add --checkpoint WEIGHTS"):
        write(tmp_path, "--cells", tmp_path)


def test_features_beside_results_are_shown_in_an_explorer(write, results, monkeypatch):
    monkeypatch.setattr(explorer, "has_umap", lambda: False)  # which takes long to import
    page = write(results, "--max-cells", "20")
    assert ("h2", "Embedding explorer") in page.headings
    assert page.json["explorer"]["n"] == 20
