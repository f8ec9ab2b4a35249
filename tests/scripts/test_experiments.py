"""The experiments on real cells: the split, runs of recipes, the tables, and patients made of cells."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dinov2.configs import CONFIG_FOLDER
from dinov2.train import train as train_command
from dinov2.utils.config import load_run_config

TINY = [
    *("student.depth=1", "student.embed_dim=32", "student.num_heads=2", "train.batch_size_per_gpu=4"),
    *("student.patch_size=7", "crops.global_crops_size=28", "crops.local_crops_size=14", "train.image_size=28"),
    *("train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2"),
    *("optim.warmup_epochs=1", "optim.freeze_last_layer_epochs=1", "teacher.warmup_teacher_temp_epochs=1"),
    *("evaluation.eval_period_iterations=2", "train.tensorboard=false", "train.device=cpu"),
]
SCRIPTS = Path(__file__).parents[2] / "scripts"
CONFIG = CONFIG_FOLDER / "train" / "small_from_scratch.yaml"
STAGES = {"BA": "basophil", "MY": "ig", "ERB": "erythroblast", "PLATELET": "platelet"}


@pytest.fixture
def pbc(tmp_path, write_images):
    """A small data set in PBC's layout: twelve images of four stages, a copy, and one image in two classes."""
    folder = tmp_path / "PBC"
    names = [(kind, f"{stage}_{number}.png") for stage, kind in STAGES.items() for number in range(12)]
    contents = {folder / kind / name: content for content, (kind, name) in enumerate(names)}
    contents[folder / "basophil" / "BA_copy.png"] = contents[folder / "basophil" / "BA_3.png"]
    contents |= dict.fromkeys([folder / "basophil" / "BA_99.png", folder / "ig" / "MY_99.png"], 999)
    write_images(contents)
    return folder


def test_the_split_has_every_image_once(script, pbc, tmp_path):
    learn = script("learn")
    assert learn.write_split(learn.find_pbc_images(pbc), tmp_path / "split") == {"train": 36, "test": 12}
    listed = (tmp_path / "split" / "lists" / "train.txt").read_text().splitlines()
    tables = {
        name: pd.read_csv(tmp_path / "split" / f"{name}.csv") for name in ("train8", "test8", "train10", "test10")
    }
    assert listed == tables["train8"]["Image Path"].tolist()
    assert not set(listed) & set(tables["test8"]["Image Path"])
    assert not any("_99" in path for path in [*listed, *tables["test8"]["Image Path"]])
    assert tables["test8"]["Label"].value_counts().to_dict() == dict.fromkeys(STAGES.values(), 3)
    assert set(tables["train10"]["Label"]) == {"basophil", "myelocyte", "erythroblast"}  # platelets have no stage
    assert learn.write_split(learn.find_pbc_images(pbc), tmp_path / "again") == {"train": 36, "test": 12}
    assert (tmp_path / "again" / "test8.csv").read_text() == (tmp_path / "split" / "test8.csv").read_text()


def test_a_folder_without_the_data_set_is_an_error_before_anything_is_written(pbc, tmp_path, write_images):
    write_images({tmp_path / "others" / "a.png": 0})
    command = [sys.executable, SCRIPTS / "experiments" / "learn.py", "--output-dir", tmp_path / "arena"]
    for flags, message in (
        (["--pbc", tmp_path / "nowhere"], f"{tmp_path}/nowhere: No such file or directory"),
        (["--pbc", tmp_path / "others"], f"--pbc: {tmp_path}/others has 1 images, and no name of one begins with BA, "),
        (["--pbc", pbc, "--ssl", tmp_path], f"{tmp_path}/Class Labels of Dataset 1.csv: No such file or directory"),
    ):
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert done.returncode != 0
        assert done.stderr.startswith(message), done.stderr
    assert not (tmp_path / "arena").exists()


@pytest.fixture
def ssl(tmp_path, write_images):
    """Four cells of SSL Seg in its layout."""
    repository = tmp_path / "segmentation_WBC"
    write_images({repository / "Dataset 1" / f"{number:03d}.bmp": number for number in range(1, 5)})
    labels = "image ID,class label\n1,1\n2,2\n3,3\n4,4\n"
    (repository / "Class Labels of Dataset 1.csv").write_text(labels, encoding="utf-8-sig")
    return repository


@pytest.fixture
def pbc_of_ssl_classes(tmp_path, write_images):
    """A small data set in PBC's layout with the classes of SSL Seg; basophils are in one of them only."""
    kinds = {"SNE": "neutrophil", "LY": "lymphocyte", "MO": "monocyte", "EO": "eosinophil", "BA": "basophil"}
    names = [(kind, f"{stage}_{number}.png") for stage, kind in kinds.items() for number in range(10)]
    write_images({tmp_path / "PBC" / kind / name: content for content, (kind, name) in enumerate(names, start=100)})
    return tmp_path / "PBC"


RECIPES = """
.shared: &shared {lejepa.loss_weight: 0}
dino: {config_file: small_with_prototypes.yaml}
lejepa:
  <<: *shared
  lejepa.loss_weight: 1
  dino.loss_weight: 0
  ibot.loss_weight: 0
"""


def in_this_process(command: list[str]) -> subprocess.CompletedProcess:
    """Train as the command does, without the seconds in which a new process imports torch."""
    return subprocess.CompletedProcess(command, train_command.main(command[2:]))


@pytest.mark.slow
def test_a_killed_experiment_goes_on_within_its_run_and_ends_as_an_unbroken_one(
    script, pbc_of_ssl_classes, ssl, tmp_path, rows_of, monkeypatch
):
    learn = script("learn")
    (tmp_path / "recipes.yaml").write_text(RECIPES)
    data = ["--pbc", str(pbc_of_ssl_classes), "--ssl", str(ssl), "--recipes", str(tmp_path / "recipes.yaml")]
    tiny = [*TINY, "train.saveckp_freq=2", "train.log_period=1"]

    def command(name: str, *only: str) -> list[str]:
        for recipe in only:  # as if measured: forty steps
            (tmp_path / name / recipe).mkdir(parents=True)
            (tmp_path / name / recipe / "cost.json").write_text('{"core_seconds_per_step": 0.025}')
        flags = ["--output-dir", str(tmp_path / name), "--budgets", "1", "--seeds", "4", "--only", *only, "--"]
        return [*data, *flags, *tiny]

    killed = command("killed", "lejepa", "dino")
    run = tmp_path / "killed" / "dino" / "1s" / "seed4"  # the first in the file
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        [sys.executable, learn.__file__, *killed], env=environment, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not any(run.glob("checkpoints/iteration_*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (run / "scores.csv").exists()
    monkeypatch.setattr(learn, "subprocess", SimpleNamespace(run=in_this_process))
    learn.main(killed)
    learn.main(command("unbroken", "dino"))
    losses = [
        [json.loads(line)["total_loss"] for line in path.read_text().splitlines()]
        for path in sorted(tmp_path.glob("*/dino/1s/seed4/training_metrics.json"))
    ]
    assert len(losses[0]) == 40
    assert losses[0] == losses[1]
    assert "resuming" in (run / "logs" / "log.txt").read_text()
    of_killed, of_unbroken = (
        pd.read_csv(tmp_path / name / "dino/1s/seed4/scores.csv") for name in ("killed", "unbroken")
    )
    pd.testing.assert_frame_equal(of_killed, of_unbroken)
    assert len(of_killed) == 2 * 3 * 2  # tasks, kinds of features, protocols
    recalls = of_killed.filter(like="recall of ")
    np.testing.assert_allclose(recalls.mean(axis=1), of_killed["score"])  # balanced accuracy

    scores = pd.read_csv(tmp_path / "killed" / "scores.csv")
    assert set(scores["name"]) == {"colour histogram", "dino, 1s", "lejepa, 1s"}
    assert set(scores["task"]) == {learn.WITHIN, learn.TRANSFER}
    assert set(scores["kind"]) == {"cls", "mean", "cls+mean"}
    assert set(scores["method"]) == {"knn_20", "linear"}
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["score"] <= scores["high"]).all()
    header, histogram, *runs = rows_of(tmp_path / "killed" / "results.md")
    assert set(header[2:]) == {"cls", "mean", "cls+mean"}
    assert histogram[0] == "colour histogram"
    assert [row[0] for row in runs[:2]] == ["dino, 1s", "lejepa, 1s"]
    assert any("eosinophil (2)" in row for row in runs)
    assert runs[-3][-8:] == ["0%", "25%", "50%", "75%", "100%", "steps", "images", "minutes"]
    assert runs[-1][-3:-1] == ["40", "160"]

    figures = []
    monkeypatch.setattr(learn, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[-1])
    monkeypatch.setattr(learn.Arena, "train", lambda *_: pytest.fail("all of it is done"))
    learn.main(killed)
    lines = figures[-1].axes[0].lines[:2]
    assert [line.get_label() for line in lines] == ["dino", "lejepa"]
    np.testing.assert_allclose(lines[0].get_xdata(), [0.25, 0.5, 0.75, 1.0])  # core-seconds
    np.testing.assert_allclose(lines[0].get_ydata(), list(learn.curve(run).values())[1:])
    assert (tmp_path / "killed" / "curves.png").is_file()
    (tmp_path / "recipes.yaml").write_text(RECIPES.replace("lejepa.loss_weight: 1", "lejepa.loss_weight: 2"))
    with pytest.raises(SystemExit, match=r"lejepa has results of other settings: .*_weight=1'.*choose another recipe"):
        learn.main(killed)
    data[data.index("--ssl") + 1] = str(shutil.copytree(ssl, tmp_path / "other"))
    with pytest.raises(SystemExit, match=r"killed has results of other settings: .*choose another --output-dir"):
        learn.main([*data, *killed[len(data) :]])


@pytest.mark.slow
def test_the_cost_of_a_step_is_measured_once(script, pbc, tmp_path, monkeypatch):
    learn = script("learn")
    monkeypatch.setattr(learn, "N_MEASUREMENTS", 1)
    monkeypatch.setattr(learn, "LONG", 105)
    learn.write_split(learn.find_pbc_images(pbc), tmp_path)
    arena, recipe = learn.Arena(tmp_path), learn.Recipe(CONFIG, TINY)
    train, long = arena.train, tmp_path / "tiny" / "105_steps"
    train(long, recipe, *arena.steps(recipe, 105))  # left by a stopped measurement: it must not count
    assert long.is_dir()
    cost = arena.cost("tiny", recipe)
    assert 0.002 < cost < 1
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["cost.json"]
    arena.train = lambda *_: pytest.fail("it is known")
    assert arena.cost("tiny", recipe) == cost


def test_a_run_that_stops_or_fails_ends_the_experiment_with_its_exit_code(script, tmp_path, monkeypatch):
    learn = script("learn")
    monkeypatch.setattr(learn, "subprocess", SimpleNamespace(run=lambda _: subprocess.CompletedProcess([], 75)))
    with pytest.raises(SystemExit, match="75"):
        learn.Arena(tmp_path).train(tmp_path / "run", learn.Recipe(tmp_path / "config.yaml", []))


def test_a_configuration_that_changed_is_not_the_one_that_was_run(script, tmp_path, monkeypatch):
    learn, config = script("learn"), tmp_path / "config.yaml"
    config.write_text(CONFIG.read_text())
    arena, recipe = learn.Arena(tmp_path), learn.Recipe(config, [])
    monkeypatch.setattr(arena, "train", lambda *_: None)
    monkeypatch.setattr(arena, "score", lambda *_: pd.DataFrame([{"score": 0.5}]))
    arena.run("own", recipe, None, 0)
    config.write_text(f"# a comment\n{CONFIG.read_text()}")
    arena.run("own", recipe, None, 1)
    config.write_text(CONFIG.read_text().replace("center_crop: 0.5", "center_crop: 0.6"))
    with pytest.raises(SystemExit, match="own has results of other settings"):
        arena.run("own", recipe, None, 2)


def test_the_recipes_of_the_benchmark_are_valid_configurations(script):
    learn = script("learn")
    recipes = learn.read_recipes(Path(learn.__file__).parent / "recipes.yaml", CONFIG)
    cfgs = {
        name: load_run_config(recipe.config, [*recipe.overrides, "train.dataset_path=HemaStandardDataset:root=cells"])
        for name, recipe in recipes.items()
    }
    assert {name for name, cfg in cfgs.items() if cfg.student.embed_dim != 128} == {"wide"}
    assert cfgs["dino"].dino.loss_weight == cfgs["lejepa"].lejepa.loss_weight == 1
    assert recipes["from_scratch"].overrides == []


@pytest.mark.parametrize("content", ["a: [", "- a", "a: 3", None])
def test_a_file_without_recipes_is_named(script, tmp_path, content):
    file = tmp_path / "recipes.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=r"--recipes: .*recipes.yaml is no list of recipes .*; write"):
        script("learn").read_recipes(file, CONFIG)


@pytest.mark.slow
def test_networks_that_should_forget_the_slide_are_tested_on_other_slides(script, tmp_path, rows_of, monkeypatch):
    forget_slide = script("forget_slide")
    monkeypatch.setattr(forget_slide, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(forget_slide, "PARTS", {"train": (3, 2), "unseen": (2, 2)})
    monkeypatch.setattr(forget_slide, "SIZE", 28)
    size = [*TINY[:8], "train.log_period=1", "train.device=cpu"]
    suppress = "suppress slide, weight 0.1"
    flags = ["--output-dir", str(tmp_path), "--seeds", "4", "--steps", "2", "--only", suppress, "standardised images"]
    command = [*flags, "--", *size]
    forget_slide.main(command)
    cells = {part: pd.read_csv(tmp_path / "cells" / f"{part}.csv") for part in ("train", "unseen")}
    assert {part: len(rows) for part, rows in cells.items()} == {"train": 60, "unseen": 40}
    assert not set(cells["train"]["slide"]) & set(cells["unseen"]["slide"])
    header, *rows = rows_of(tmp_path / "results.md")
    assert header == ["recipe", "seeds", "class, kNN-20", "class, linear", "slide, linear", "slide, 1-NN"]
    assert [row[0] for row in rows] == ["untrained", suppress, "standardised images"]
    levels = np.stack([np.asarray(Image.open(path)) for path in (tmp_path / "standardised" / "unseen").iterdir()])
    assert len(levels) == 40
    assert np.abs(levels.mean(axis=(1, 2)) - 160).max() < 5  # of each colour; less is cut off at black
    assert all(0 <= float(value) <= 1 for row in rows for value in row[2:])
    metrics = (tmp_path / "suppress_slide_weight_0.1" / "seed4" / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["metadata_loss"] > 0 for line in metrics] == [False, True]
    monkeypatch.setattr(forget_slide, "train", lambda *_: pytest.fail("all of it is done"))
    forget_slide.main(command)
    with monkeypatch.context() as changed:
        changed.setattr(forget_slide, "RECIPES", {**forget_slide.RECIPES, suppress: ["train.metadata.column=slide"]})
        with pytest.raises(SystemExit, match=r"suppress_slide_weight_0\.1 has results of other settings: .*checksum"):
            forget_slide.main(command)
    command[command.index("2")] = "3"
    with pytest.raises(SystemExit, match=r"has results of other settings: \{'steps': 2.*choose another --output-dir"):
        forget_slide.main(command)


def test_patients_have_planted_cells_or_none(script):
    real_cells = script("real_cells")
    labels = ["erythroblast"] * 130 + ["monocyte", "basophil"] * 600
    cells = pd.DataFrame({"Image Path": [f"{number}.png" for number in range(len(labels))], "Label": labels})
    patients = real_cells.make_patients(cells)
    assert patients["Image Path"].is_unique
    assert patients["patient"].value_counts().eq(20).all()
    planted = patients["Image Path"].map(cells.set_index("Image Path")["Label"]).eq("erythroblast")
    assert planted.tolist() == patients["cell"].eq("erythroblast").tolist()
    per_patient = planted.groupby([patients["Label"], patients["patient"]]).sum()
    assert per_patient["without"].eq(0).all()
    assert per_patient["with"].between(2, 4).all()


def test_attention_on_planted_cells_counts_the_patients_that_have_them(script, tmp_path, capsys):
    cells = ["erythroblast", "other", "other", "other"]
    patients = pd.DataFrame({"Image Path": list("abcd"), "patient": ["1", "1", "2", "2"], "cell": cells})
    patients.to_csv(tmp_path / "patients.csv", index=False)
    attention = pd.DataFrame({"source": list("abcd"), "patient": list("1122"), "attention": [0.9, 0.1, 0.5, 0.5]})
    attention.to_csv(tmp_path / "attention.csv", index=False)
    script("real_cells").main(["--output-dir", str(tmp_path), "--attention", str(tmp_path / "attention.csv")])
    assert capsys.readouterr().out == "planted cells get 90% of the attention; they are 50% of the cells\n"


def test_ssl_cells_are_those_that_are_there(script, tmp_path, write_images):
    repository = tmp_path / "segmentation_WBC"
    write_images({repository / "Dataset 1" / "001.bmp": 1, repository / "Dataset 1" / "003.bmp": 3})
    labels = "image ID,class label\n1,1\n2,2\n3,5\n"
    (repository / "Class Labels of Dataset 1.csv").write_text(labels, encoding="utf-8-sig")
    script("real_cells").main(["--ssl", str(repository), "--output-dir", str(tmp_path / "out")])
    cells = pd.read_csv(tmp_path / "out" / "ssl_seg.csv")
    assert cells["Label"].tolist() == ["neutrophil", "basophil"]
    assert [path.rsplit("/", 1)[1] for path in cells["Image Path"]] == ["001.bmp", "003.bmp"]
