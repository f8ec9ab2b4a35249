"""The notebooks: stored without outputs, and they run from the first cell to the last."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from dinov2.models import architecture, build_backbone

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
FEATURES_AND_PCA, TRAIN_ON_YOUR_CELLS, FEW_LABELS, AML_SUBTYPING = (
    Path(__file__).parents[1] / "notebooks" / f"{name}.ipynb"
    for name in ("features_and_pca", "train_on_your_cells", "few_labels", "aml_subtyping_abmil")
)


@pytest.fixture
def checkpoint(tmp_path):
    """A small network's teacher file, as a training run on 28-px crops writes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        description = {"arch": "vit_tiny", "depth": 2, "patch_size": 14, "layerscale": 1.0, "block_chunks": 0}
        model = build_backbone({**description, "img_size": 28})
    backbone = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"teacher": backbone, "architecture": architecture(model)}, tmp_path / "teacher_checkpoint.pth")
    return tmp_path / "teacher_checkpoint.pth"


@pytest.fixture
def cells(tmp_path):
    """Eleven images of two classes."""
    rng = np.random.default_rng(0)
    for n in range(11):
        file = tmp_path / "cells" / ("blast", "platelet")[n % 2] / f"{n:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
    return tmp_path / "cells"


@pytest.fixture
def place(tmp_path):
    """Where a notebook runs: a folder `notebooks` in a folder that is not this project."""
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    return tmp_path / "clone" / "notebooks"


def read(file: Path):
    return nbformat.read(file, as_version=4)


def code_cells(notebook, **parameters) -> list[str]:
    """Their code in order; `parameters` are set after the cell that is tagged so."""
    sources = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            sources.append(cell.source)
            if "parameters" in cell.metadata.get("tags", []):
                sources.append("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    return sources


@pytest.fixture
def run_here(place, monkeypatch):
    """Runs a notebook's code in this process, which has loaded torch already; gives its names and number of figures."""

    def run(file: Path, **parameters) -> tuple[dict, int]:
        shown = []
        monkeypatch.chdir(place)
        monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
        names: dict = {}
        before = matplotlib.get_backend()
        plt.switch_backend("agg")
        try:
            with torch.random.fork_rng(devices=[]):
                for source in code_cells(read(file), **parameters):
                    exec(compile(source, str(file), "exec"), names)
        finally:
            plt.close("all")
            plt.switch_backend(before)
        return names, len(shown)

    return run


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_notebooks_are_stored_without_outputs(file):
    nbformat.validate(read(file))
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_features_and_pca_in_a_kernel(checkpoint, cells, place, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own draws into the notebook
    parameters = {"CHECKPOINT": str(checkpoint), "CELLS": str(cells), "GRID": 4, "N_SHOWN": 3}
    arrays = ("features", "places", "tokens", "first", "patch_colours")
    notebook = read(FEATURES_AND_PCA)
    sources = code_cells(notebook, **parameters)
    sources.append(f"import json\nprint(json.dumps({{name: globals()[name].shape for name in {arrays}}}))")
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    errors = [output.text for output in outputs if output.output_type == "stream" and output.name != "stdout"]
    assert errors == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert json.loads(outputs[-1].text) == {
        "features": [11, 192],
        "places": [11, 2],
        "tokens": [3, 16, 192],
        "first": [3, 4, 4],
        "patch_colours": [3, 4, 4, 3],
    }
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "11 cells of 2 classes: blast, platelet" in text
    assert "shorter side to 28 px" in text  # as the network was trained


def test_features_and_pca_has_a_network_and_draws_cells(place, run_here, capsys):
    names, n_figures = run_here(FEATURES_AND_PCA, N_DRAWN=20, GRID=8, N_SHOWN=8)
    assert n_figures == 2
    assert names["features"].shape == (20, 128)
    assert len(names["class_names"]) == 10
    assert len(set(names["classes"][names["shown"]])) == 8  # one of each class before a second of any
    colours, is_foreground = names["patch_colours"], names["is_foreground"]
    assert 0 < is_foreground.mean() < 1
    assert (colours[~is_foreground] == 1).all()
    assert 0 <= colours.min() < colours.max() <= 1
    first, is_middle = names["first"], names["is_middle"]
    assert first[:, is_middle].mean() > first[:, ~is_middle].mean()
    assert "dinobloom_tiny_pbc: " in capsys.readouterr().out
    assert list(place.iterdir()) == []


def test_train_on_your_cells_draws_trains_and_finds_neighbours(place, tmp_path, run_here):
    settings = ["student.depth=1", "train.tensorboard=false"]
    output = tmp_path / "output"
    names, n_figures = run_here(
        TRAIN_ON_YOUR_CELLS, STEPS=4, IMAGES_PER_STEP=4, OUTPUT=str(output), MORE_SETTINGS=settings
    )
    assert names["code"] == 0
    assert n_figures == 3
    assert [step["iteration"] for step in names["steps"]] == [0, 1, 2, 3]
    assert [result["iteration"] for result in names["results"]] == [0, 1, 2, 3, 4]
    assert names["features"].shape == (300, 128)
    assert names["positions"][:, 0].tolist() == names["asked"].tolist()
    assert "LeJEPA, distances between views. run: from " in (output / "report.html").read_text(encoding="utf-8")
    assert list(place.iterdir()) == []


def test_train_on_your_cells_takes_a_folder_without_labels(place, cells, run_here):
    settings = ["student.depth=1", "train.tensorboard=false"]
    names, n_figures = run_here(
        TRAIN_ON_YOUR_CELLS, CELLS=str(cells), STEPS=1, IMAGES_PER_STEP=2, MORE_SETTINGS=settings
    )
    assert names["code"] == 0
    assert n_figures == 3
    assert names["results"] == []
    assert len(names["kept"]) == 11


def test_aml_subtyping_draws_patients_and_tests_each_once(place, run_here):
    names, n_figures = run_here(AML_SUBTYPING, N_DRAWN=25, EPOCHS=2)
    assert n_figures == 5
    assert names["confusion"].sum() == 25
    assert names["predicted"].keys() == names["label_of"].keys()
    assert len(names["attention"]) == len(names["cells"])
    assert sum(names["weights"]) == pytest.approx(25, abs=1e-3)  # 1 a patient
    assert len(names["excess"]) == 10
    assert list(place.iterdir()) == []


def test_aml_subtyping_takes_patients_and_a_checkpoint(place, checkpoint, tmp_path, run_here):
    rng = np.random.default_rng(0)
    lines = ["Image Path,Label,patient"]
    for patient in range(20):
        label = ("AML", "control")[patient % 2]
        for number in range(3):
            file = tmp_path / f"{patient}_{number}.png"
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)
            lines.append(f"{file.name},{label},p{patient:02d}")
    (tmp_path / "patients.csv").write_text("\n".join(lines) + "\n")
    names, n_figures = run_here(
        AML_SUBTYPING, PATIENTS=str(tmp_path / "patients.csv"), CHECKPOINT=str(checkpoint), EPOCHS=1
    )
    assert n_figures == 4  # a bag, the matrix, a patient of each of two classes
    assert names["names"] == ["AML", "control"]
    assert names["excess"] == {}


def test_few_labels_draws_trains_compares_and_classifies(place, tmp_path, run_here, capsys):
    names, n_figures = run_here(
        FEW_LABELS,
        N_DRAWN=(12, 60, 10),
        STEPS=2,
        IMAGES_PER_STEP=4,
        EPOCHS=1,
        OUTPUT=str(tmp_path / "output"),
        MORE_SETTINGS=["student.depth=1", "train.tensorboard=false"],
    )
    assert names["code"] == 0
    assert n_figures == 2
    split = {mode: (tmp_path / "output" / mode / "split.csv").read_text() for mode in ("knn", "linear", "head", "full")}
    assert len(set(split.values())) == 1
    assert all(found["interval"] for found in names["differences"].values())
    assert list(names["differences"]) == [
        *("head against linear probe", "head against kNN-5", "full against linear probe", "full against kNN-5")
    ]
    assert 10 <= len(names["review"])
    assert "finetune_applied" in capsys.readouterr().out  # metrics of the new cells, which have labels
    assert list(place.iterdir()) == []


def test_few_labels_takes_folders_and_adapts_a_checkpoint_by_lora(place, checkpoint, cells, tmp_path, run_here):
    settings = ["student.depth=2", "crops.global_crops_size=28", "train.image_size=32", "train.tensorboard=false"]
    names, n_figures = run_here(
        FEW_LABELS,
        UNLABELLED=str(cells),
        LABELLED=str(cells),
        NEW=str(cells / "blast"),
        CHECKPOINT=str(checkpoint),
        RECIPE="small_with_prototypes.yaml",
        STEPS=1,
        IMAGES_PER_STEP=2,
        MODES=["lora"],
        EPOCHS=1,
        OUTPUT=str(tmp_path / "output"),
        MORE_SETTINGS=settings,
    )
    assert names["code"] == 0
    assert n_figures == 2
    assert names["differences"].keys() == {"lora against linear probe", "lora against kNN-5"}
    assert {row["path"] for row in names["review"]} == {str(path) for path in (cells / "blast").iterdir()}
