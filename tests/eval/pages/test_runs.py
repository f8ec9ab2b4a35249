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
    shown = page.table("All losses together")
    for row in rows:
        cell = shown[str(row["iteration"])]["run, first"]
        if row["total_loss"] is None:
            assert cell.text == "not a number"
        else:
            assert cell.values == [row["total_loss"]]
            assert cell.shown == [f"{row['total_loss']:.5g}"]
    newest = json.loads((run_folder / "eval" / "training_8" / "results.json").read_text())["datasets"][EVIL]["knn"]
    rows_of = {
        (row[2].text, row[3].text): row for row in page.tables[next(c for c in page.tables if "Newest" in c)][1:]
    }
    assert rows_of[EVIL, "knn_5"][4].values == [newest["knn_5"]["accuracy"]]
    assert page.table("State and faults")["run, first"]["skipped steps"].values == [1]
    assert page.charts[f"{EVIL}: accuracy"]["knn_5"][0] == [0, 4, 8]
    assert page.charts[f"{EVIL}: accuracy"]["knn_5"][1][-1] == newest["knn_5"]["accuracy"]


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
    assert page.charts["Learning rate"]["broken"][0] == [0, 2, 3]


def test_a_run_that_has_written_nothing_yet(write, make_run):
    folder = make_run("young", n=0)
    (folder / "logs").mkdir()
    page = write(folder)
    assert "0 of 8 iterations" in page.table("Training runs")["young"]["state"].text
    assert "No iteration has been written yet" in page.words


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
    row = page.table("State and faults")["faulty"]
    counts = [row[name].text for name in ("rollbacks", "resumed", "unreadable images", "warnings")]
    assert counts == ["1", "1", "1", "3"]
    assert page.table("faulty: warnings of the log")[f"cannot read {EVIL}"]["times"].text == "2"
    assert page.table("faulty: unreadable images")['a, "b".png']["reason"].text == EVIL
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
    images = [attrs["alt"] for tag, attrs in page.elements if tag == "img"]
    shown = ("Crops, iteration 0", "Crops, iteration 12", "Masks, iteration 4")
    assert images == [f"{what} of a training batch" for what in shown]
    assert "too many for the page" in page.words


def test_several_runs_share_charts(write, make_run, run_folder):
    other = make_run("second", n=6, evaluations=(4,), overrides=["optim.base_lr=0.5"])
    file = other / "eval" / "training_4" / "results.json"
    file.write_text(file.read_text().replace('"n_test": 30', '"n_test": 31'))
    page = write(run_folder, other)
    rows = page.table("All losses together")
    assert list(rows["0"]) == ["iteration", "run, first", "second"]
    assert rows["7"]["second"].text == ""
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
    assert page.table("All losses together")["12345"]["long"].values == [88.25]
    assert len(xs) < 1_000
    assert len(page.text) < 2_000_000
