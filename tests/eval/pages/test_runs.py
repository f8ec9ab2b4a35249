"""Sections about runs: their numbers are those of the files, and whatever a run left is taken."""

import json
from dataclasses import asdict

import numpy as np

from dinov2.utils.run_status import RunStatus

EVIL = "</script><img src=x onerror=alert(1)>"
NAMES = [EVIL, 'lymphocyte, "large"', "Zelle ü β"]


def lines(folder):
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


def test_numbers_of_a_run_come_back_out_of_the_page(page, run_folder):
    rows = lines(run_folder)
    assert len(rows) == 8
    titles = {"lr": "Learning rate", "grad_norm_backbone": "Grad norm backbone", "total_loss": "All losses together"}
    for name, title in titles.items():
        xs, ys = page.charts[title]["run, first"]
        assert xs == list(range(8))
        finite = [row[name] is not None and (name != "grad_norm_backbone" or row[name] > 0) for row in rows]
        assert [y for y, is_finite in zip(ys, finite, strict=True) if is_finite] == [
            row[name] for row, is_finite in zip(rows, finite, strict=True) if is_finite
        ]
        assert np.isfinite(ys).tolist() == finite
    assert len(page.charts) >= len(rows[0]) - 1, "every number has a chart"
    shown = page.table("run, first: numbers")
    for name, title in titles.items():
        values = [row[name] for row in rows if row[name] is not None]
        numbers = {"newest": values[-1], "lowest": min(values), "highest": max(values)}
        for header, number in numbers.items():
            assert shown[title][header].values == [number]
            assert shown[title][header].shown == [f"{number:.5g}"]
        assert shown[title]["iterations that have it"].values == [len(values)]
    newest = json.loads((run_folder / "eval" / "training_8" / "results.json").read_text())["datasets"][EVIL]["knn"]
    method = f"{EVIL} knn knn_5"
    (of_method,) = [row for row in page.tables["Newest and best teacher of each run"] if row[2].text == method]
    assert of_method[3].values == [newest["knn_5"]["accuracy"]]
    assert page.table("Training runs")["run, first"]["skipped steps"].values == [1]
    xs, ys = page.charts[f"{method}: accuracy"]["run, first"]
    assert xs == [0, 4, 8]
    assert ys[-1] == newest["knn_5"]["accuracy"]


def test_settings_and_their_difference_from_the_default(page):
    table = page.table("Settings that differ")
    assert table["train.seed"]["default"].text == "0"
    assert table["train.seed"]["run, first"].text == "7"
    assert "optim.base_lr" not in table
    assert "base_lr:" in page.text  # all of config.yaml, folded away


def test_a_run_still_going_is_no_error(write, make_run, results):
    folder = make_run("going", n=5, n_all=20)
    with open(folder / "training_metrics.json", "a") as file:
        file.write('{"iteration": 5, "total_lo')
    page = write(folder)
    row = page.table("Training runs")["going"]
    assert "5 of 20 iterations" in row["state"].text
    assert "going on, or stopped" in row["state"].text
    assert row["state"].values == [5, 20]
    assert "Not everything could be read" not in page.words
    assert ("h2", "Teachers during training") not in page.headings


def test_lines_in_the_middle_that_are_broken_are_counted(write, make_run):
    folder = make_run("broken", n=4)
    text = (folder / "training_metrics.json").read_text().splitlines()
    text[1] = text[1][:20]
    text.insert(3, text[0])  # an iteration that stands twice
    (folder / "training_metrics.json").write_text("\n".join([*text, "[]", ""]))
    page = write(folder / "training_metrics.json")
    assert "broken: 2 lines of training_metrics.json are no JSON object" in page.words
    assert page.charts["Learning rate"]["broken"][0] == [0, 2, 3]


def test_a_run_that_has_written_nothing_yet(write, make_run):
    folder = make_run("young", n=0)
    (folder / "logs").mkdir()
    page = write(folder)
    assert "0 of 8 iterations" in page.table("Training runs")["young"]["state"].text
    assert "young: no training_metrics.json" in page.words


def test_faults_of_a_run_are_listed(write, make_run):
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
    row = page.table("Training runs")["faulty"]
    counts = [row[name].text for name in ("rollbacks", "resumed", "unreadable images", "warnings")]
    assert counts == ["1", "1", "1", "3"]
    assert page.table("faulty: newest of 2 warnings")[f"cannot read {EVIL}"]["times"].text == "2"
    assert page.table("faulty: unreadable images")['a, "b".png']["reason"].text == EVIL
    origins = page.tables["What each was made from and with"]
    assert ["faulty", "start 1", "commit", "abc123"] in [[cell.text for cell in row] for row in origins]
    assert "config.yaml is not readable" in page.words


def test_several_runs_share_charts(write, make_run, run_folder):
    other = make_run("second", n=6, evaluations=(4,), overrides=["optim.base_lr=0.5"])
    file = other / "eval" / "training_4" / "results.json"
    file.write_text(file.read_text().replace('"n_test": 30', '"n_test": 31'))
    page = write(run_folder, other)
    lines = page.charts["All losses together"]
    assert {name: len(xs) for name, (xs, _) in lines.items()} == {"run, first": 8, "second": 6}
    table = page.table("Settings that differ")["optim.base_lr"]
    assert (table["run, first"].text, table["second"].text) == (table["default"].text, "0.5")
    assert "differ between the runs, and their numbers do not compare" in page.words


def test_long_runs_are_thinned_and_keep_their_spikes(write, make_run):
    folder = make_run("long", n=1, n_all=100_000)
    row = lines(folder)[0]
    with open(folder / "training_metrics.json", "w") as file:
        for i in range(20_000):
            own = {"iteration": i, "total_loss": 88.25 if i == 12_345 else 1.0 + i % 7}
            file.write(json.dumps(row | own) + "\n")
    page = write(folder)
    xs, ys = page.charts["All losses together"]["long"]
    assert ys[xs.index(12_345)] == 88.25
    assert page.table("long: numbers")["All losses together"]["highest"].values == [88.25]
    assert len(xs) < 1_000
    assert len(page.text) < 2_000_000


def test_a_number_of_the_iterations_of_the_log_is_drawn_as_a_line_without_gaps(write, make_run):
    folder = make_run("sparse", values=lambda i: {"patch_prototype_use": 0.1 * i} if i % 3 == 2 else {})
    xs, ys = write(folder).charts["Share of prototypes in use, masked patches"]["sparse"]
    assert xs == [2, 5]
    assert np.isfinite(ys).all()
