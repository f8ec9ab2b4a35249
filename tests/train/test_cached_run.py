"""train.py on a data set with `cache=`: the same run as without, whatever happens to images and cache in between."""

import csv
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dinov2.train.train import main
from dinov2.utils.command import StopSignals


@pytest.fixture
def train(tmp_path, make_image_list, make_tiny_overrides):
    """Run on eight images, with a cache or without; returns the exit code and the rows of its metrics."""
    lists = make_image_list(tmp_path / "lists")

    def go(name: str, *, cached: bool, arguments: tuple[str, ...] = (), **settings) -> tuple[int, list[dict]]:
        dataset = f"train.dataset_path=HemaStandardDataset:root={lists}:shuffle=1"
        if cached:
            dataset += f":cache={tmp_path / 'cache'}"
        overrides = [*make_tiny_overrides(lists)[1:], dataset, "train.max_bad_fraction=0.5"]
        code = main(["--output-dir", str(tmp_path / "out"), "--name", name, *arguments, *overrides], **settings)
        metrics = tmp_path / "out" / name / "training_metrics.json"
        return code, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []

    return go


def losses(rows: list[dict]) -> list[tuple]:
    return [(row["iteration"], row["total_loss"], row["grad_norm_backbone"]) for row in rows]


def bad_images(run) -> list[str]:
    with open(run / "bad_images.csv", newline="") as file:
        return [row["path"] for row in csv.DictReader(file)]


def test_a_cache_changes_no_number(train):
    code, plain = train("plain", cached=False)
    assert (code, len(plain)) == (0, 4)
    code, cached = train("cached", cached=True)
    assert (code, losses(cached)) == (0, losses(plain))
    code, again = train("again", cached=True)
    assert (code, losses(again)) == (0, losses(plain))


def test_images_that_changed_or_went_are_seen_by_the_next_run(train, tmp_path):
    _, before = train("before", cached=True)
    images = tmp_path / "lists" / "images"
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).save(images / "001.png")
    (images / "002.png").unlink()
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:200])
    code, plain = train("plain", cached=False)
    assert code == 0
    code, cached = train("cached", cached=True)
    assert (code, losses(cached)) == (0, losses(plain))
    assert losses(cached) != losses(before)
    gone = [str(images / name) for name in ("002.png", "003.png")]
    for name in ("plain", "cached"):
        assert sorted(bad_images(tmp_path / "out" / name)) == gone


def test_a_run_that_is_stopped_while_it_packs_goes_on_later(train, tmp_path):
    signals = StopSignals()
    signals.received = signal.SIGTERM
    code, rows = train("run", cached=True, signals=signals)
    assert (code, rows) == (75, [])
    code, rows = train("run", cached=True)
    assert (code, len(rows)) == (0, 4)


def test_a_dry_run_writes_no_cache(train, tmp_path):
    code, _ = train("run", cached=True, arguments=("--dry-run",))
    assert code == 0
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_does_not_fit_on_the_disk_is_refused(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1000, used=1000, free=0))
    code, rows = train("run", cached=True)
    assert (code, rows) == (2, [])
    assert not list((tmp_path / "cache").rglob("pixels.bin"))
    assert "make room" in capsys.readouterr().err
